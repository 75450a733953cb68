"""The former name of saccade.train.runtime.checkpoint, kept for one release."""

from .runtime.checkpoint import *  # noqa: F403
