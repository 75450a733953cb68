"""`saccade.explain`: what the attention of a model did with an image, drawn and as numbers."""

from .methods import Explained, explain
from .subject import Subject, load

__all__ = ["Explained", "Subject", "explain", "load"]
