"""BiFormer equals the published models, and does what a timm backbone should."""

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.biformer import Block, FullAttention, RoutedAttention, rename
from support import parity
from support.graphs import BACKENDS, compiles_and_exports
from support.levels import exhaustive
from torch import Tensor

pytestmark = pytest.mark.usefixtures("double")  # as default type


def published(tmp_path, fixture: dict, name: str, container: str | None = "model", **kwargs):
    """Our model with the fixture's weights, loaded as a user loads a published file."""
    file = tmp_path / "published.pth"
    weights = parity.weights(fixture)
    torch.save({container: weights} if container else weights, file)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        exhaustive("biformer_tiny", "biformer_t"),
        ("biformer_tiny_pad_192x160", "biformer_t"),
        exhaustive("biformer_stl", "biformer_stl"),
    ],
)
def test_equals_published_model(tmp_path, fixture, name):
    want = parity.load("biformer", fixture)
    model = published(tmp_path, want, name)
    x = parity.image(want)
    logits = model(x)
    parity.assert_equal("logits", logits, want["outputs"]["logits"])
    for i, stage in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        parity.assert_equal(f"stage{i + 1}", stage, want["outputs"][f"stage{i + 1}"])
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    (logits * parity.seeded(1, logits.shape)).sum().backward()
    parity.assert_gradients(model, want["grads"], rename)


def test_equals_published_dense_backbone(tmp_path):
    want = parity.load("biformer", "biformer_tiny_dense_n8_160x200")
    model = published(tmp_path, want, "biformer_t", "state_dict", features_only=True, n_win=8, out_norms=True)
    maps = model(parity.image(want))
    for i, m in enumerate(maps):
        parity.assert_equal(f"feat{i + 1}", m, want["outputs"][f"feat{i + 1}"])
    every = torch.cat([m.flatten(1) for m in maps], 1)
    parity.assert_equal("all", every, want["outputs"]["all"])
    (every * parity.seeded(1, every.shape)).sum().backward()
    parity.assert_gradients(model.model, want["grads"], rename)


def test_nchw_model_equals_stl(tmp_path):
    """Where n_win divides the map, both published operators compute the same (LePE of the last stage apart)."""
    want = parity.load("biformer", "biformer_stl")
    legacy = published(tmp_path, want, "biformer_stl")
    nchw_keys = {}
    for key, value in parity.weights(want).items():
        key = key.replace("qkv.qkv.", "qkv_linear.").replace("attn.wo.", "attn.output_linear.")
        linear = any(part in key for part in ("qkv", "proj", "output_linear", "mlp")) and value.ndim == 2
        nchw_keys[key] = value[..., None, None] if linear else value
    file = tmp_path / "nchw.pth"
    torch.save({"model": nchw_keys}, file)
    overlay = dict(file=str(file))
    nchw = timm.create_model("biformer_stl_nchw", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = parity.seeded(3, (1, 3, 224, 224))
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


def small(**kwargs):
    """BiFormer with every kind of layer, small enough to run anywhere."""
    kwargs = dict(depths=(1, 1, 2, 1), dims=(32, 64, 64, 64), topks=(1, 2, 4, -2), n_win=4, num_classes=7) | kwargs
    torch.manual_seed(0)
    return timm.create_model(kwargs.pop("name", "biformer_t"), **kwargs)


COUNTS = dict(biformer_t=13_142_760, biformer_s=25_536_232, biformer_b=56_804_968, biformer_stl=28_372_552)


@pytest.mark.parametrize(("name", "count"), [*COUNTS.items(), ("biformer_stl_nchw", 28_372_552)])
def test_parameter_counts(name, count):
    """Those counted on the published models."""
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_published_containers(tmp_path, container, prefix):
    """Files hold the weights under 'model' or 'state_dict'; a detector's file holds ours behind 'backbone.'."""
    want = parity.load("biformer", "biformer_tiny")
    weights = {prefix + k: v for k, v in parity.weights(want).items()}
    if prefix:
        weights["decode_head.conv_seg.weight"] = torch.zeros(3)
    file = tmp_path / "published.pth"
    torch.save({container: weights, "epoch": 3} if container else weights, file)
    model = timm.create_model("biformer_t", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    expected = parity.weights(want)["stages.2.7.attn.qkv.qkv.weight"]
    assert torch.equal(model.stages[2].blocks[7].attn.qkv.weight, expected)
    assert torch.equal(model.head.fc.bias, parity.weights(want)["head.bias"])


def test_dense_weights_load_into_a_classifier(tmp_path):
    """What a dense file lacks, the head, keeps its initial values; what it has beyond, the norms, is dropped."""
    want = parity.load("biformer", "biformer_tiny_dense_n8_160x200")
    model = published(tmp_path, want, "biformer_t", "state_dict", num_classes=5)
    assert model.head.fc.weight.shape == (5, 512) and model.head.fc.weight.std() > 0.01
    expected = parity.weights(want)["stages.0.0.norm1.weight"]
    assert torch.equal(model.stages[0].blocks[0].norm1.weight, expected)


@pytest.mark.parametrize("name", ["biformer_t", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (97, 45), (224, 112)], ids=str)
def test_any_size(name, size):
    model = small(name=name, features_only=True).eval()
    floor = "stl" in name
    for level, m in enumerate(model(torch.randn(2, 3, *size))):
        stride = 4 * 2**level
        assert m.shape[2:] == tuple(n // stride if floor else -(-n // stride) for n in size)
        assert m.isfinite().all()


def test_auto_pad_changes_nothing_where_the_map_divides():
    x = torch.randn(2, 3, 128, 128)
    assert torch.equal(small().eval()(x), small(auto_pad=False).eval()(x))


def test_images_do_not_see_each_other():
    model, x = small().eval(), torch.randn(3, 3, 75, 90)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_changes_nothing():
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_out_norms_do_not_reach_the_next_stage():
    x = torch.randn(1, 3, 64, 64)
    plain, normed = small().eval(), small(out_norms=True).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x), normed(x))
    for raw, out in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (plain, normed))):
        centred = raw - raw.mean(1, keepdim=True)
        torch.testing.assert_close(out, centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt())


def test_bfloat16_autocast_is_close():
    torch.set_default_dtype(torch.float32)
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    exact = model.double()(x.double())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.05


@BACKENDS
def test_compiles_and_exports(backend):
    torch.set_default_dtype(torch.float32)
    compiles_and_exports(small(), (72, 64), backend)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(topks=(1, 17, 4, -2)), "topks must be -1, -2 or between 1 and the n_win\\*\\*2 = 16 regions, got 17"),
        (dict(topks=(1, 4, -2)), "depths, dims and topks must be equally long"),
        (dict(dims=(32, 48, 64, 64)), "dims of routed stages must be multiples of head_dim=32"),
    ],
)
def test_impossible_models_are_refused_in_one_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**kwargs)


def test_sizes_that_do_not_divide_are_refused_without_auto_pad():
    with pytest.raises(ValueError, match="auto_pad=False needs maps that n_win=4 divides, got one of 18x16"):
        small(auto_pad=False)(torch.randn(1, 3, 72, 64))
