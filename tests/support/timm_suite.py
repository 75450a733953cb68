"""timm's own tests/test_models.py over one model of ours, as a command line for `support.jobs.Job`: FOLDER MODEL.

timm's tests are parametrised by `list_models` at import; here it lists that one name. Token models, whose features are
(B, N, C), go where timm puts its vision transformers.
"""

import sys

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import timm.models
from timm.models import _registry

TOKEN_MODELS: tuple[str, ...] = ("agent_deit_", "sparsifiner_")
# Tests that expect a gradient for every parameter. Sparsifiner's predictors have none by design: their mask is
# discrete, and they are trained by a separate loss on their scores.
EVERY_GRADIENT = ("test_model_backward", "test_model_backward_fx", "test_prune_intermediate_layers_contract")


class OneModel:
    """A pytest plugin that keeps only the tests of one model."""

    def __init__(self, name: str):
        self.name = name
        token = name.startswith(TOKEN_MODELS)

        def list_models(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
            if pretrained:
                return []  # no weights can be fetched here; tests/backbones loads published state dicts
            if isinstance(filter, list | tuple) and "vit_*" in filter:
                return [name] if token else []
            if isinstance(exclude_filters, list | tuple) and "vit_*" in exclude_filters:
                return [] if token else [name]
            return [] if filter else [name]  # a filter asks for one of timm's own families

        for module in (timm, timm.models, _registry):  # before timm's test module is imported
            module.list_models = list_models
            module.list_pretrained = lambda filter="", exclude_filters="": []

    def pytest_collection_modifyitems(self, config, items):
        ours = [item for item in items if self.name in item.name]
        if self.name.startswith("sparsifiner_"):
            ours = [item for item in ours if item.originalname not in EVERY_GRADIENT]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


def main() -> None:
    folder, name = sys.argv[1:]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--import-mode=importlib", f"--rootdir={folder}"]
    options += ["-c", f"{folder}/pyproject.toml", f"{folder}/tests/test_models.py"]
    raise SystemExit(int(pytest.main(options, plugins=[OneModel(name)])))
