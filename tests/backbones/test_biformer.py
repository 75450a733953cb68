"""BiFormer equals the published models, and does what a timm backbone should."""

import functools

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.biformer import Block, FullAttention, RoutedAttention, rename
from support import parity
from support.backbones import Pyramid
from support.levels import exhaustive
from support.parity import load_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("double")  # as default type


SMALL = dict(depths=(1, 1, 2, 1), dims=(32, 64, 64, 64), topks=(1, 2, 4, -2), n_win=4, num_classes=7)


def small(name="biformer_t", **kwargs):
    """BiFormer with every kind of layer, small enough to run anywhere."""
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | kwargs))


@functools.cache
def published_keys() -> dict[str, str]:
    """Return our names of a tiny model's parameters, with the norms of a dense one, and the published ones."""
    fixtures = (parity.load("biformer", name) for name in ("biformer_tiny", "biformer_tiny_dense_n8_160x200"))
    return {rename(key): key for fixture in fixtures for key, _, _ in fixture["state"]}


class TestBiFormer(Pyramid):
    FIXTURES, NAME, SMALL, small, rename = "biformer", "biformer_t", SMALL, staticmethod(small), staticmethod(rename)
    WHOLE = (
        exhaustive("biformer_tiny", "biformer_t", {}),
        ("biformer_tiny_pad_192x160", "biformer_t", {}),
        exhaustive("biformer_stl", "biformer_stl", {}),
    )
    DENSE = (("biformer_tiny_dense_n8_160x200", "biformer_t", dict(n_win=8, out_norms=True)),)
    MAPS = ("feat1", "feat2", "feat3", "feat4", "all")
    COUNTS = dict(
        biformer_t=13_142_760,
        biformer_s=25_536_232,
        biformer_b=56_804_968,
        biformer_stl=28_372_552,
        biformer_stl_nchw=28_372_552,
    )
    test_macs = None  # nobody published a count of the code
    SIZES = (*Pyramid.SIZES, (224, 112))
    SIZED = {name: dict(name=name) for name in ("biformer_t", "biformer_stl", "biformer_stl_nchw")}
    PREFIXES = ("", "backbone.")
    ALIENS = {
        "another depth": (dict(depths=(1, 1, 1, 1)), "stages.2.blocks.1.* is missing there"),
        "another family": ("test_resnet", "entries of its stages do not fit"),
    }
    IMPOSSIBLE = (
        (dict(topks=(1, 17, 4, -2)), "topks must be -1, -2 or between 1 and the n_win\\*\\*2 = 16 regions, got 17"),
        (dict(topks=(1, 4, -2)), "depths, dims and topks must be equally long"),
        (dict(dims=(32, 48, 64, 64)), "dims of routed stages must be multiples of head_dim=32"),
    )
    BLOCKS = 5
    CHECKPOINT_RTOL = 1e-12
    EPS = 1e-6
    COMPILED = {"two stages": dict(depths=(1, 1), dims=(32, 64), topks=(2, -2)), "small": exhaustive({})}
    COMPILED_SIZE = (72, 64)

    def file(self, weights):
        return {"model": weights}

    def published(self, key):
        return published_keys()[key]

    def side(self, n, stride, name):
        return n // stride if "stl" in name else -(-n // stride)


def test_nchw_model_equals_stl(tmp_path):
    """Where n_win divides the map, both published operators compute the same (LePE of the last stage apart)."""
    want = parity.load("biformer", "biformer_stl")
    legacy = load_file(tmp_path, {"model": parity.weights(want)}, "biformer_stl")
    nchw_keys = {}
    for key, value in parity.weights(want).items():
        key = key.replace("qkv.qkv.", "qkv_linear.").replace("attn.wo.", "attn.output_linear.")
        linear = any(part in key for part in ("qkv", "proj", "output_linear", "mlp")) and value.ndim == 2
        nchw_keys[key] = value[..., None, None] if linear else value
    nchw = load_file(tmp_path, {"model": nchw_keys}, "biformer_stl_nchw")
    x = parity.seeded(3, (1, 3, 112, 112))
    for a, b in zip(*(m.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True) for m in (legacy, nchw))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.std().item())


def layer(fixture: dict) -> torch.nn.Module:
    c = fixture["config"]
    kind = fixture["variant"]
    if "bra" in kind:
        return RoutedAttention(
            c["dim"], c["num_heads"], c["n_win"], c["topk"], c.get("auto_pad", False) or "nchw" in kind, "nchw" in kind
        )
    if kind.startswith("block"):
        attn = FullAttention(c["dim"])
        if c["topk"] > 0:
            attn = RoutedAttention(c["dim"], c["num_heads"], c["n_win"], c["topk"])
        return Block(c["dim"], attn, c["mlp_ratio"], True, 0.0)
    return FullAttention(c["dim"], lepe=kind != "attn_plain", lepe_on_v="nchw" in kind)


def layer_rename(fixture: dict):
    """Published key of a single layer -> ours, by way of the keys of a whole model."""
    at = "" if fixture["variant"].startswith("block") else "attn."
    return lambda key: rename(f"stages.0.0.{at}{key}").removeprefix(f"stages.0.blocks.0.{at}")


LAYERS = ["attn_lepe", "attn_plain", "block_k4", "block_km2", "bra_all", "bra_k1", "bra_k3", "bra_pad_10x17_k4"]
LAYERS += ["bra_pad_9x13_k2", "bra_pad_9x9_n7_k16", "nchw_attn_lepe", "nchw_bra_k3", "nchw_bra_odd_10x17"]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    want = parity.load("biformer", name)
    module = layer(want).eval()
    ours = layer_rename(want)
    weights = {ours(k): v for k, v in parity.weights(want).items()}
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    module.load_state_dict({k: v.reshape(shapes[k]) for k, v in weights.items()})
    x = parity.image(want).requires_grad_()
    nchw = "nchw" in name or "block" in name
    y = module(x.permute(0, 2, 3, 1) if nchw else x)
    y = y.permute(0, 3, 1, 2) if nchw else y
    parity.assert_equal("y", y, want["outputs"]["y"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    parity.assert_gradients(module, want["grads"], ours)
    if "routed_sorted" in want["outputs"]:
        _, _, idx, _, _ = module._project(x.permute(0, 2, 3, 1) if nchw else x)
        parity.assert_equal("routed", idx.sort(-1).values, want["outputs"]["routed_sorted"])
    if "q_region" in want["outputs"]:
        qkv, _, _, (rows, cols), _ = module._project(x)
        means = region_means(qkv, rows, cols)
        q, k, _ = means.chunk(3, -1)
        parity.assert_equal("q_region", q, want["outputs"]["q_region"])
        parity.assert_equal("k_region", k, want["outputs"]["k_region"])
        parity.assert_equal("logits", q.shape[-1] ** -0.5 * q @ k.mT, want["outputs"]["routing_logits"])


def region_means(qkv: Tensor, rows: int, cols: int) -> Tensor:
    return qkv.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).mean((2, 4)).flatten(1, 2)


def test_auto_pad_changes_nothing_where_the_map_divides():
    x = torch.randn(2, 3, 128, 128)
    assert torch.equal(small().eval()(x), small(auto_pad=False).eval()(x))


def test_sizes_that_do_not_divide_are_refused_without_auto_pad():
    with pytest.raises(ValueError, match="auto_pad=False needs maps that n_win=4 divides, got one of 18x16"):
        small(auto_pad=False)(torch.randn(1, 3, 72, 64))
