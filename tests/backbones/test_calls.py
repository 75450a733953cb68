"""Layers are called, or computed as if they were: hooks fire, and whatever replaces or changes a layer takes effect."""

import copy
from operator import methodcaller
from types import MethodType

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import torch
import torch.distributed as dist
from saccade.backbones.layers import can_fuse
from support.families import SMALL, build, images
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("double")

every_family = pytest.mark.parametrize("name", SMALL)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def run(model: nn.Module, name: str) -> list[torch.Tensor]:
    """Output, gradients and buffers after a training step's forward and backward."""
    torch.manual_seed(1)
    y = model.train()(*images(name))
    model.zero_grad()
    y.square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [y.detach(), *grads, *model.buffers()]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@every_family
def test_hooks_fire_on_every_layer(name):
    """And output, gradients and running statistics are those of the operators."""
    fused = build(name)
    hooked, fired = copy.deepcopy(fused), set()
    layers = {key: m for key, m in hooked.named_modules() if isinstance(m, LAYERS + NORMS)}
    if name == "sparsifiner_lvvit_s":
        del layers["aux"]  # runs in evaluation alone
    for key, layer in layers.items():
        layer.register_forward_hook(lambda module, args, y, key=key: fired.add(key))
    assert_equal(run(hooked, name), run(fused, name))
    assert fired == set(layers)


class Wrapped(nn.Module):
    """A layer inside another, as LoRA and sharding have it, without any of the layer's attributes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@every_family
def test_replaced_layers_are_called(name):
    plain = build(name)
    replaced = copy.deepcopy(plain)
    for module in list(replaced.modules()):
        if type(module).__module__.startswith("saccade"):  # timm's and torchvision's modules read their own layers
            for key, child in module.named_children():
                if isinstance(child, LAYERS + NORMS):
                    setattr(module, key, Wrapped(child))
    assert any(isinstance(m, Wrapped) for m in replaced.modules())
    assert_equal(run(replaced, name), run(plain, name))


def reparametrize(layer: nn.Module, kind: str) -> None:
    dict(
        pruned=lambda: prune.random_unstructured(layer, "weight", 0.5),
        weight_norm=lambda: torch.nn.utils.weight_norm(layer),
        spectral_norm=lambda: torch.nn.utils.spectral_norm(layer),
        parametrized_weight_norm=lambda: parametrizations.weight_norm(layer),
        parametrized_spectral_norm=lambda: parametrizations.spectral_norm(layer),
    )[kind]()


def restore(layer: nn.Module, kind: str) -> None:
    if kind == "pruned":
        prune.remove(layer, "weight")
    elif kind.startswith("parametrized"):
        parametrize.remove_parametrizations(layer, "weight")
    else:
        getattr(torch.nn.utils, f"remove_{kind}")(layer)


KINDS = ("pruned", "weight_norm", "spectral_norm", "parametrized_weight_norm", "parametrized_spectral_norm")
FUSED = (
    "agent_deit_t",
    "agent_swin_t",
    "davit_t",
    "ela_resnet18",
    "patnet_t1",
    "sparsifiner_deit_t",
    "ulsam_mobilenet_v2",
)


EACH_ONCE = [
    pytest.param(name, kind, marks=() if j == i % len(KINDS) else pytest.mark.exhaustive)
    for i, name in enumerate(FUSED)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize(("name", "kind"), EACH_ONCE)
def test_reparametrized_layers_train(name, kind):
    """Two steps; then the model computes what it does with plain layers of the weights that they have by then."""
    model, x = build(name), images(name)
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    for layer in layers:
        reparametrize(layer, kind)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        model.train()(*x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = model.eval()(*x)
        for layer in layers:
            restore(layer, kind)
        assert all(type(layer).__name__[:12] != "Parametrized" for layer in layers)
        torch.testing.assert_close(model(*x), before, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@every_family
def test_linear_layers_can_be_quantized(name):
    torch.set_default_dtype(torch.float32)
    model, x = build(name).eval(), images(name)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        y, expected = quantized(*x), model(*x)
    assert y.isfinite().all() and not torch.equal(y, expected)
    assert (y - expected).norm() < 0.3 * expected.norm()


class OwnNorm(nn.BatchNorm2d):
    """Computes what BatchNorm2d does, but is not taken for it."""


@pytest.mark.parametrize("name", ["patnet_t0", "patnet_t1", "ulsam_mobilenet_v1_050", "ulsam_mobilenet_v2"])
@pytest.mark.parametrize("how", ["update_bn", "no running statistics", "different norms"])
def test_batch_norm_in_every_mode(name, how):
    model = build(name).train()
    called = copy.deepcopy(model)
    for m in called.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = OwnNorm
    x = [images(name, seed=seed)[0] for seed in range(3)]
    for m in (model, called):
        norms = [norm for norm in m.modules() if isinstance(norm, nn.BatchNorm2d)]
        if how == "update_bn":
            torch.optim.swa_utils.update_bn(x, m)
        elif how == "no running statistics":
            for norm in norms:
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        else:
            for i, norm in enumerate(norms):
                norm.train(i % 2 == 0)
                norm.momentum, norm.eps = 0.1 + 0.01 * i, 1e-5 * (1 + i)
        m(x[0]), m(x[1])
    torch.testing.assert_close(model(x[2]), called(x[2]), rtol=1e-7, atol=1e-9)
    for ours, theirs in zip(model.buffers(), called.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


class Batch(nn.GroupNorm):
    """GroupNorm in one group per channel, called rather than computed."""


def replace(model: nn.Module, change) -> int:
    """Replace each layer for which change(layer) is not None, and return how many."""
    count = 0
    for module in list(model.modules()):
        if type(module).__module__.startswith("saccade"):
            for key, child in module.named_children():
                if (new := change(child)) is not None:
                    setattr(module, key, new)
                    count += 1
    return count


@pytest.mark.parametrize("name", ["patnet_t1", "ulsam_mobilenet_v2"])
def test_group_norm_in_the_place_of_batch_norm(name):
    """Habit where batches are small; the class known to operators gives what a subclass, which is called, gives."""
    models = [build(name) for _ in range(2)]
    for model, norm in zip(models, (nn.GroupNorm, Batch)):
        assert replace(model, lambda m: norm(1, m.num_features) if type(m) is nn.BatchNorm2d else None)  # noqa: B023
    assert_equal(*(run(model, name) for model in models))


@pytest.mark.parametrize("name", ["biformer_t", "agent_pvt_t"])
def test_relu_in_the_place_of_gelu(name):
    models = [build(name) for _ in range(2)]
    for model, activation in zip(models, (nn.ReLU(), Wrapped(nn.ReLU()))):
        assert replace(model, lambda m: activation if type(m) is nn.GELU else None)  # noqa: B023
    assert_equal(*(run(model, name) for model in models))


@pytest.mark.parametrize("name", ["agent_pvt_t", "biformer_t", "ela_resnet18"])
def test_circular_padding(name):
    """As set for panoramas and textures: convolutions give what they give when they are called."""
    models = [build(name) for _ in range(2)]
    for model in models:
        for m in model.modules():
            if isinstance(m, (nn.Conv1d, nn.Conv2d)) and not isinstance(m.padding, str):
                m.padding_mode, m._reversed_padding_repeated_twice = (
                    "circular",
                    [n for n in m.padding[::-1] for _ in "ab"],
                )
                if model is models[1]:
                    m.register_forward_hook(lambda *_: None)
                    m.forward = MethodType(lambda m, x: m._conv_forward(x, m.weight, m.bias), m)
    assert_equal(*(run(model, name) for model in models))


class Subclass(nn.Linear):
    pass


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
CHANGES = dict(
    parametrization=lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    own_forward=lambda layer: setattr(layer, "forward", layer.forward),
    tensor_subclass=lambda layer: setattr(layer, "weight", nn.Parameter(TwoTensor(layer.weight, layer.weight))),
    **{hook: methodcaller(f"register_{hook}", print) for hook in HOOKS},
)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_layers_are_not_fused(change):
    layer = nn.Linear(2, 2)
    assert can_fuse(layer, nn.Linear(2, 2))
    change(layer)
    assert not can_fuse(layer, nn.Linear(2, 2)) and not can_fuse(nn.Linear(2, 2), layer)


def test_subclasses_are_not_fused():
    assert not can_fuse(Subclass(2, 2)) and not can_fuse(OwnNorm(2))


@pytest.mark.parametrize("hook", HOOKS)
def test_no_layer_is_fused_under_hooks_for_all_modules(hook):
    """Except those by which a FLOP counter knows which module runs: it counts what runs without it."""
    handle = getattr(torch.nn.modules.module, f"register_module_{hook}")(print)
    try:
        assert not can_fuse(nn.Linear(2, 2))
    finally:
        handle.remove()
    with FlopCounterMode(display=False):
        assert can_fuse(nn.Linear(2, 2))


@pytest.mark.parametrize(("name", "value"), dict(training=False, momentum=0.2, eps=1e-3).items())
def test_norms_that_differ_are_not_fused(name, value):
    norm, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    assert can_fuse(norm, other)
    setattr(other, name, value)
    assert can_fuse(norm) and can_fuse(other) and not can_fuse(norm, other)


@pytest.mark.parametrize(
    "argument", [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)], ids=str
)
def test_norms_that_operators_do_not_know_are_not_fused(argument):
    assert not can_fuse(nn.BatchNorm2d(2, **argument))


@pytest.mark.parametrize("name", ["sparsifiner_deit_t", "sparsifiner_lvvit_s"])
def test_unused_parameters_under_ddp(name):
    """A user's own loop with plain DistributedDataParallel: what is unused gets no gradient, as without it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone, x = build(name).train(), images(name)
        model = copy.deepcopy(alone)
        wrapped = nn.parallel.DistributedDataParallel(model)
        pairs = [(m, torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1)) for m in (alone, model)]
        for _ in range(3):
            for called, (m, optimizer) in zip((alone, wrapped), pairs):
                called(*x).square().mean().backward()
                assert all((p.grad is None) == (".predictor." in n or "aux." in n) for n, p in m.named_parameters())
                optimizer.step()
                optimizer.zero_grad()
    finally:
        dist.destroy_process_group()
    assert_equal(list(model.parameters()), list(alone.parameters()))
