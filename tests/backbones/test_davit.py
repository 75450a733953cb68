"""DaViT equals the published models and timm's, and does what a timm backbone should."""

import re

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import safetensors.torch
import timm
import torch
from saccade.backbones.davit import Block, ChannelAttention, ConvPosEnc, Downsample, Stem, WindowAttention, rename
from support import parity
from support.backbones import Pyramid
from support.levels import exhaustive
from support.parity import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


SMALL = dict(depths=(1, 1, 2, 1), dims=(32, 32, 64, 64), window_size=3, num_classes=7)


def small(**kwargs):
    """DaViT with every kind of layer, small enough to run anywhere."""
    torch.manual_seed(0)
    return timm.create_model("davit_t", **(SMALL | kwargs))


class TestDaViT(Pyramid):
    FIXTURES, NAME, SMALL, small = "davit", "davit_t", SMALL, staticmethod(small)
    rename = staticmethod(rename)
    WHOLE = (exhaustive("davit_tiny", "davit_t", {}), ("davit_tiny_150x198", "davit_t", {}))
    DENSE = (("davit_tiny_dense_192x256", "davit_t", dict(out_norms=True)),)
    MAPS = ("norm0", "norm1", "norm2", "norm3", "all")
    COUNTS = dict(  # of davit_h and davit_g, for which there is no code, the paper's
        davit_t=28_360_168,
        davit_s=49_745_896,
        davit_b=87_954_408,
        davit_l=196_811_752,
        davit_h=362_685_416,
        davit_g=1_437_435_880,
    )
    # Of the published file and of the paper. The counter leaves the norms' out.
    MACS = dict(davit_t=4.540, davit_s=8.800, davit_b=15.510, davit_l=102.97, davit_h=334, davit_g=1038)
    SIZES = (*Pyramid.SIZES, (1, 5))
    SIZED = {"plain": {}, "overlapped": dict(overlapped_patch=True)}
    CHANNELS_LAST = True
    ALIENS = {
        "another depth": (
            dict(depths=(1, 1, 1, 1)),
            "32 of 172 .* do not fit, stages.2.blocks.1.0.cpe1.proj.weight is missing there",
        ),
        "another merge": (
            dict(overlapped_patch=True),
            r"3 of 172 .* is \(32, 32, 3, 3\) there and \(32, 32, 2, 2\) here",
        ),
        "another family": ("test_resnet", "172 of 172 entries of its stages do not fit"),
    }
    IMPOSSIBLE = (
        (dict(depths=(1, 1, 1)), r"depths and dims must be equally long, got \(1, 1, 1\) and \(32, 32, 64, 64\)"),
        (dict(dims=(32, 48, 64, 64)), "dims must be multiples of head_dim=32, got"),
        (dict(window_size=0), "window_size must be at least 1, got 0"),
    )
    BLOCKS = 10  # of attention: timm has one rate for each pair
    LEARNING = dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), drop_path_rate=0.1)
    COMPILED = {"two stages": dict(dims=(32, 64), depths=(1, 1))}
    COMPILED_SIZE = (20, 24)

    def published(self, key: str) -> str:
        key = re.sub(r"^stages\.(\d)\.blocks", r"main_blocks.\1", key)
        key = re.sub(r"^stages\.(\d)\.downsample", r"patch_embeds.\1", key).replace("stem.", "patch_embeds.0.")
        key = re.sub(r"^(patch_embeds\.\d)\.conv", r"\1.proj", key).replace("out_norms.", "norm")
        key = key.replace("cpe1", "cpe.0").replace("cpe2", "cpe.1")
        return key.replace("head.norm", "norms").replace("head.fc", "head")


def test_blocks_of_windows_and_of_channels_alternate():
    blocks = [m for m in small().modules() if isinstance(m, Block)]
    assert [type(block.attn) for block in blocks] == [WindowAttention, ChannelAttention] * 5


def test_a_model_without_its_third_stage_has_that_ones_width():
    model = small(out_norms=True).eval()
    model.prune_intermediate_layers([0, 2])
    assert (
        model.num_features == 64
        and model.forward_head(model.forward_features(torch.randn(1, 3, 64, 64))).shape[1] == 64
    )


def layer(fixture: dict) -> nn.Module:
    c, kind = fixture.get("config", {}), fixture["variant"]
    if kind.startswith("patch_stem"):
        return Stem(3, c["embed_dim"])
    if kind.startswith("patch_merge"):
        return Downsample(c["in_chans"], c["embed_dim"], c.get("overlapped", False))
    if kind == "conv_pos_enc":
        return ConvPosEnc(64)
    if kind.startswith(("window", "spatial")):
        attn = WindowAttention(c["dim"], c["num_heads"], c.get("window_size", 7))
    else:
        attn = ChannelAttention(c["dim"], c["num_heads"])
    return Block(c["dim"], attn, 4.0, c.get("ffn", True), 0.0) if "block" in kind else attn


# How the layer takes the fixture's input, and back: attention is recorded on tokens, the others on NCHW maps.
VIEWS = dict(
    window_attention=(lambda x: x.unflatten(1, (7, 7)), lambda y: y.flatten(1, 2)),
    channel_attention=(lambda x: x.unflatten(1, (5, 7)), lambda y: y.flatten(1, 2)),
    block=(lambda x: x.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)),
    patch=(lambda x: x, lambda y: y),
)
LAYERS = dict(
    window_attention="window_attention",
    channel_attention="channel_attention",
    conv_pos_enc="block",
    spatial_block_10x13="block",
    channel_block_10x13="block",
    channel_block_noffn="block",
    patch_stem_30x45="patch",
    patch_merge_9x13="patch",
    patch_merge_overlapped_9x13="patch",
)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    want = parity.load("davit", name)
    module = layer(want).eval()

    def ours(key: str) -> str:
        return key.replace("proj.", "conv.") if name.startswith("patch") else rename("." + key)[1:]

    module.load_state_dict({ours(k): v for k, v in parity.weights(want).items()})
    x = parity.image(want).requires_grad_()
    there, back = VIEWS[LAYERS[name]]
    y = back(module(there(x)))
    parity.assert_equal("y", y, want["outputs"]["y"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    parity.assert_gradients(module, want["grads"], ours)


def test_timms_davit_is_the_same_function(tmp_path):
    """Its weights load and give its outputs, at a size that pads every map; and ours load there."""
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny", num_classes=9).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))  # biases are zero at first, and then padding tokens are as well
    ours = load_file(tmp_path, theirs.state_dict(), "davit_t", num_classes=9)
    x = torch.randn(1, 3, 75, 109)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    theirs.load_state_dict(ours.state_dict())


def test_head_pools_before_it_normalises():
    model = small().eval()
    with torch.no_grad():
        model.head.norm.weight.uniform_()
    last = model.forward_features(torch.randn(2, 3, 64, 64))
    pooled = nn.functional.layer_norm(last.mean((2, 3)), (64,), model.head.norm.weight, eps=1e-5)
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(last), model.head.fc(pooled))


def test_without_mlps():
    model = small(ffn=False)
    assert not any("mlp" in key or "norm2" in key for key in model.state_dict())
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("suffix", [exhaustive("pth"), "safetensors"])
def test_timms_weights_load(tmp_path, suffix):
    """The layout of timm/davit_tiny.msft_in1k, in both of its file types."""
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny").eval()
    file, state = tmp_path / f"weights.{suffix}", theirs.state_dict()
    safetensors.torch.save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    ours = timm.create_model("davit_t", pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
