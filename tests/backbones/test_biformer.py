"""BiFormer equals the published models, and does what a timm backbone should."""

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.biformer import Block, FullAttention, RoutedAttention, rename
from support import parity
from torch import Tensor


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def published(tmp_path, fixture: dict, name: str, container: str | None = "model", **kwargs):
    """Our model with the fixture's weights, loaded as a user loads a published file."""
    file = tmp_path / "published.pth"
    weights = parity.weights(fixture)
    torch.save({container: weights} if container else weights, file)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@pytest.mark.parametrize(
    ("fixture", "name"),
    [("biformer_tiny", "biformer_t"), ("biformer_tiny_pad_192x160", "biformer_t"), ("biformer_stl", "biformer_stl")],
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
