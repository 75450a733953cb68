"""DiNAT with gathered neighborhoods: tools/published/nat.py has it."""

from .nat import build  # noqa: F401
