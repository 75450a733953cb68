"""Entry points of torch.hub: every model of saccade.backbones under its own name, with timm.create_model's arguments.

torch.hub.load("PATH/TO/THIS/REPOSITORY", "biformer_t", source="local", num_classes=10)
"""

import functools
import importlib.util
import pathlib
import sys
import types

dependencies = ["torch", "timm"]


def _register_models() -> None:
    """Import saccade.backbones, from this checkout where saccade is not installed."""
    if importlib.util.find_spec("saccade") is None:
        root = pathlib.Path(__file__).resolve().parent
        saccade = sys.modules["saccade"] = types.ModuleType("saccade")
        saccade.__path__ = [str(root)]  # as the installed package maps saccade.ops to ops, and so on
    importlib.import_module("saccade.backbones")


def _entry_points() -> dict:
    import timm

    _register_models()
    entries = {}
    for name in timm.list_models():
        entry = timm.model_entrypoint(name)
        if entry.__module__.startswith("saccade."):
            entries[name] = functools.partial(timm.create_model, name)
            entries[name].__doc__ = entry.__doc__
    return entries


globals().update(_entry_points())
