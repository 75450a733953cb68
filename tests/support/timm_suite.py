"""pytest plugin: timm's own tests/test_models.py, run over models that saccade registers and no others.

By default over a small model of each family, to save time; the patterns in SACCADE_TIMM_SUITE choose others, and
SACCADE_TIMM_SUITE='*' (make test-all) takes all, which takes an hour.

timm's tests are parametrised by `list_models` at import; here it lists our names. Token models, whose features are
(B, N, C), go where timm puts its vision transformers: name them in TOKEN_MODELS.
"""

import fnmatch
import os

import timm
import timm.models
from timm.models import _registry

TOKEN_MODELS: tuple[str, ...] = ("agent_deit_*", "sparsifiner_*")
SMALLEST = (
    "biformer_t davit_t ela_resnet18 halo_26t patnet_t0 agent_pvt_t agent_deit_t sparsifiner_deit_t "
    "ulsam_mobilenet_v1_050"
)
# Tests that want a gradient for every parameter. Sparsifiner's predictors have none by design: the mask that they make
# is discrete, and they learn from a loss of their own, on their scores.
EVERY_GRADIENT = ("test_model_backward", "test_model_backward_fx", "test_prune_intermediate_layers_contract")


def pytest_configure(config):  # before timm's test module is imported
    theirs = set(timm.list_models())
    import saccade.backbones  # noqa: F401

    patterns = os.environ.get("SACCADE_TIMM_SUITE", SMALLEST).split()
    ours = sorted(set(timm.list_models()) - theirs)
    names = [name for name in ours if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    tokens = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in TOKEN_MODELS)]
    config.saccade_models = names

    def list_models(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
        if pretrained:
            return []  # no weights can be fetched here; tests/backbones loads published state dicts
        if isinstance(filter, list | tuple) and "vit_*" in filter:
            return tokens
        if isinstance(exclude_filters, list | tuple) and "vit_*" in exclude_filters:
            return [n for n in names if n not in tokens]
        return [] if filter else names  # a filter asks for one of timm's own families

    for module in (timm, timm.models, _registry):
        module.list_models = list_models
        module.list_pretrained = lambda filter="", exclude_filters="": []


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if any(name in item.name for name in config.saccade_models)]
    ours = [item for item in ours if not (item.originalname in EVERY_GRADIENT and "sparsifiner_" in item.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
