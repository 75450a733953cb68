"""`saccade.explain`: what the attention of a model did with a picture, as pictures and numbers."""

from .methods import Explained, explain
from .subject import Subject, load

__all__ = ["Explained", "Subject", "explain", "load"]
