"""NAT, DiNAT and DiNAT_s equal the published models, and the layer equals NATTEN's; refusals and options."""

import re

import pytest
import saccade.backbones
import timm
import torch
from saccade.backbones.nat import (
    NAT,
    Block,
    ConvDownsample,
    ConvStem,
    PatchMerging,
    checkpoint_filter_fn,
    distribute,
    filling,
    rename,
    resize_table,
)
from saccade.train.runtime import measure
from support import parity
from support.backbones import Pyramid
from support.levels import exhaustive
from support.parity import load_file
from torch import nn
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.usefixtures("double")  # as default type

NeighborhoodAttention = saccade.backbones.NeighborhoodAttention


SMALL = dict(depths=(1, 2, 2, 1), dims=(32, 32, 64, 64), kernel_size=3, num_classes=7)
ADE20K = ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))


def small(name="dinat_b", **kwargs):
    """A model with every kind of layer, small enough to run anywhere."""
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | dict(dilations=(2, (1, 3), (1, 2), 1)) | kwargs))


class TestNAT(Pyramid):
    FIXTURES, NAME, SMALL, small = "nat", "dinat_b", SMALL, staticmethod(small)

    @staticmethod
    def rename(key):
        isotropic = re.match(r"layers\.\d+\.(?!blocks|downsample)", key)  # of twelve blocks in four stages
        return distribute(rename(key), (3, 3, 3, 3)) if isotropic else rename(key)

    WHOLE = (
        exhaustive("nat_mini_224", "nat_m", {}),
        exhaustive("dinat_s_tiny_130x189", "dinats_t", {}),
        ("dinat_mini_157x206", "dinat_m", {}),
        exhaustive("dinat_isotropic_small_224", "dinat_iso_s", {}),
    )
    # With other dilations, on maps smaller than the windows: each is padded.
    DENSE = (exhaustive("dinat_mini_seg_160x192", "dinat_m", dict(out_norms=True, dilations=ADE20K)),)
    MAPS = ("feat1", "feat2", "feat3", "feat4", "all")
    COUNTS = dict(
        nat_m=19_984_174,
        nat_t=27_901_582,
        nat_s=50_743_297,
        nat_b=89_769_652,
        dinat_m=19_984_174,
        dinat_t=27_901_582,
        dinat_s=50_719_681,
        dinat_b=89_769_652,
        dinat_l=200_943_514,
        dinat_l_384=200_943_514,
        dinats_t=28_288_354,
        dinats_s=49_606_258,
        dinats_b=87_768_224,
        dinats_l=196_532_476,
        dinats_l_384=196_532_476,
        nat_iso_s=21_999_736,
        nat_iso_b=86_465_800,
        dinat_iso_s=21_999_736,
        dinat_iso_b=86_465_800,
    )
    MACS = dict(nat_m=2.695, dinat_t=4.295, dinat_b=13.677, dinat_l_384=89.505, dinats_s=8.741, nat_iso_s=4.308)
    MACS_RTOL = 1e-3
    SIZES = (*Pyramid.SIZES, (1, 5))
    SIZED = dict(nat_s=dict(name="nat_s"), dinats_t=dict(name="dinats_t"))
    ALIENS = {"another depth": (dict(depths=(1, 1, 1, 1)), "do not fit")}
    IMPOSSIBLE = (
        (dict(depths=(1, 1, 1)), r"depths must have an entry for each of the 4 dims, got \(1, 1, 1\)"),
        (dict(dilations=(1, 1)), r"dilations must have an entry for each of the 4 dims, got \(1, 1\)"),
        (dict(strides=(1,)), r"strides must have an entry for each of the 4 dims, got \(1,\)"),
        (dict(dims=(32, 48, 64, 64)), "dims must be multiples of head_dim=32, got"),
        (dict(kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(strides=(4, 1, 1, 1)), "stride must be at most kernel_size = 3, got 4"),
        (dict(dilations=(0, 1, 1, 1)), "dilation must be an integer of at least 1 or two of them, got 0"),
    )
    BLOCKS = 6
    COMPILED = {"two stages": dict(dims=(32, 64), depths=(1, 1))}
    COMPILED_SIZE = (20, 24)

    def macs(self, model):
        with FakeTensorMode(allow_non_fake_inputs=True):  # on a GPU, whose kernels' formulas count
            x = torch.empty(1, *model.default_cfg["input_size"], device="cuda", dtype=torch.float32)
            return measure.macs(model.to_empty(device="cuda"), x)

    def published(self, key: str) -> str:
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^stages\.(\d)", r"levels.\1", key).replace("stem.", "patch_embed.")
        return key.replace("out_norms.", "norm").replace("head.fc", "head")


LAYERS = dict(
    module_na2d_k7_9x8=lambda: NeighborhoodAttention(64, 2, 7),
    module_na2d_k7_d2_pad_9x13=lambda: NeighborhoodAttention(dim=64, num_heads=2, kernel_size=7, dilation=2),
    module_na2d_k5_pad_3x12_nobias=lambda: NeighborhoodAttention(48, 3, 5, bias=False, qkv_bias=False),
    layer_scale_10x11=lambda: Block(64, NeighborhoodAttention(64, 2, 7), 2.0, 1e-5, 0.0),
    downsampler_9x13=lambda: ConvDownsample(64, 128),
    patch_merging_9x13=lambda: PatchMerging(64, 128),
    tokenizer_30x45=lambda: ConvStem(3, 64),
)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    """NATTEN's modules among them: their state dicts load as they are, and ours are theirs."""
    want = parity.load("nat", name)
    module, state = LAYERS[name]().eval(), parity.weights(want)
    module.load_state_dict(state)
    assert {key: value.shape for key, value in module.state_dict().items()} == {k: v.shape for k, v in state.items()}
    x = parity.image(want).requires_grad_()
    if name.startswith(("downsampler", "patch_merging")):
        y = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        y = module(x).permute(0, 2, 3, 1) if name.startswith("tokenizer") else module(x)
    parity.assert_equal("y", y, want["outputs"]["y"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    parity.assert_gradients(module, want["grads"], lambda key: key)


def test_table_of_another_kernel():
    want = parity.load("nat", "rpb_resize_k7_to_k11")
    parity.assert_equal("y", resize_table(parity.image(want), (21, 21)), want["outputs"]["y"], 1e-6)


def test_kernel_of_11():
    """dinat_large_384_11x11: 201,144,250 parameters, and the dilations of the models for 224 pixels."""
    model = timm.create_model("dinat_l_384", kernel_size=11, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 201_144_250
    assert filling(384, 11) == filling(224, 7) == ((1, 8), (1, 4), (1, 2), (1, 1))
    assert filling(384, 7) == ((1, 13), (1, 6), (1, 3), (1, 1))


def test_weights_of_transformers(tmp_path):
    """The layout of Hugging Face's NatForImageClassification and DinatForImageClassification."""
    source = {key: torch.rand_like(value) for key, value in small().state_dict().items()}
    theirs = {}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.rpb": "attention.self.rpb"}
    names |= {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for key, value in source.items():
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"dinat.encoder.levels.\1.layers.\2", key)
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"dinat.encoder.levels.{int(m[1]) - 1}.downsample", key)
        key = key.replace("stem.proj", "dinat.embeddings.patch_embeddings.projection").replace("head.fc", "classifier")
        key = re.sub(r"^stem\.", "dinat.embeddings.", key)
        key = re.sub(r"^norm\.", "dinat.layernorm.", key)
        for ours, name in names.items():
            key = key.replace(f".{ours}", f".{name}")
        if "attn.qkv" in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                theirs[key.replace("attn.qkv", f"attention.self.{part}")] = third
        elif key.endswith("gamma1"):
            theirs[key.replace("gamma1", "layer_scale_parameters")] = torch.stack(
                (
                    value,
                    source[
                        re.sub(r"^dinat\.encoder\.levels\.(\d)\.layers\.(\d)", r"stages.\1.blocks.\2", key)[:-1] + "2"
                    ],
                )
            )
        elif not key.endswith("gamma2"):
            theirs[key] = value
    model = load_file(tmp_path, theirs, "dinat_b", **SMALL)
    for key, value in model.state_dict().items():
        assert torch.equal(value, source[key]), key


def test_tables_of_another_kernel_are_resized(tmp_path):
    weights = small().state_dict()
    model = load_file(tmp_path, weights, "dinat_b", **SMALL | dict(kernel_size=5))
    table = model.stages[1].blocks[1].attn.rpb
    assert torch.equal(table, resize_table(weights["stages.1.blocks.1.attn.rpb"], (9, 9)))


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(kernel_size=6), "kernel_size must be odd where stride is 1, got 6"),
        (dict(kernel_size=(3, 5, 7)), r"kernel_size must be an integer of at least 1 or two of them, got \(3, 5, 7\)"),
        (dict(stride=(1, 8)), r"stride must be at most kernel_size = 7, got \(1, 8\)"),
        (dict(num_heads=5), "num_heads must divide dim = 32, got 5"),
    ],
)
def test_impossible_layers_are_refused_in_one_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        NeighborhoodAttention(**dict(dim=32, num_heads=2, kernel_size=7) | kwargs)


def test_layer_with_other_kernels_along_rows_and_columns():
    layer = NeighborhoodAttention(16, 2, (4, 3), (1, 2), (2, 1), rel_pos_bias=True)
    x = torch.randn(2, 5, 4, 16, requires_grad=True)
    layer(x).sum().backward()  # columns are padded from 4 to 6
    assert layer.rpb.shape == (2, 7, 5) and layer.rpb.grad.any() and x.grad.all()
    assert NeighborhoodAttention(16, 2, 3, rel_pos_bias=False).rpb is None


def test_dilations_of_a_stage_are_repeated_to_its_depth():
    model = small(depths=(3, 2, 4, 1), dilations=(5, (1, 3), (1, 2, 4), (6, 7)))
    each = [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]
    assert each == [[5, 5, 5], [1, 3], [1, 2, 4, 1], [6]]
    assert small(strides=(1, 2, 3, 1)).stages[2].blocks[0].attn.stride == (3, 3)


def test_head_normalizes_before_it_pools():
    model = small().eval()
    with torch.no_grad():
        model.norm.weight.uniform_()
    last = model.stages(model.stem(torch.randn(2, 3, 64, 64)))
    normed = nn.functional.layer_norm(last.permute(0, 2, 3, 1), (64,), model.norm.weight, eps=1e-5)
    torch.testing.assert_close(model.forward_head(model.norm(last), pre_logits=True), normed.mean((1, 2)))


def test_initialization_and_weight_decay():
    """The bias tables are decayed by timm's optimizers, as in the published training on ImageNet."""
    model = timm.create_model("nat_s", depths=(1, 1, 1, 1))
    block = model.stages[2].blocks[0]
    assert 0.019 < block.attn.qkv.weight.std() < 0.021 and 0.015 < block.attn.rpb.std() < 0.025
    assert not block.mlp.fc1.bias.any() and torch.equal(block.gamma2, torch.full((384,), 1e-5))
    assert model.no_weight_decay() == set()


def test_isotropic_models_give_four_maps_of_one_size():
    """Every third block's; files that number the blocks without stages load, ours of before and the published ones."""
    model = timm.create_model("dinat_iso_s", features_only=True, dims=(32,) * 4).eval()
    assert model.feature_info.reduction() == [16] * 4
    assert [tuple(x.shape) for x in model(torch.zeros(1, 3, 112, 112))] == [(1, 32, 7, 7)] * 4
    model = timm.create_model("dinat_iso_s", dims=(32,) * 4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.attn.dilation for block in blocks] == [(1, 1), (2, 2)] * 6
    keys = [f"layers.{i}.norm1.weight" for i in range(12)], [f"stages.0.blocks.{i}.norm1.weight" for i in range(12)]
    for names in keys:
        state = model.state_dict() | {name: torch.full((32,), float(i)) for i, name in enumerate(names)}
        loaded = checkpoint_filter_fn(state, model)
        own = [f"stages.{i // 3}.blocks.{i % 3}.norm1.weight" for i in range(12)]
        assert [loaded[name][0].item() for name in own] == list(range(12)), names[0]
    with pytest.raises(ValueError, match=r"dims must be equal in isotropic models, got \(32, 64\)"):
        NAT(dims=(32, 64), depths=(1, 1), patch_size=16, isotropic=True)
