"""The two levels of tests: what every change must pass, and what `make test-all` adds."""

from typing import Any

import pytest


def exhaustive(*values: Any) -> Any:
    """Return a case of `pytest.mark.parametrize` that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
