"""HaloNet equals timm's models and the family that the paper's table counts, and does what a timm backbone should."""

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.backbones import halonet
from saccade.backbones.halonet import HaloAttention, checkpoint_filter_fn, rename
from support.backbones import Backbone
from support.levels import exhaustive
from support.parity import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


# Our name, and the least size that timm takes at output stride 8.
HYBRIDS = dict(
    halonet26t=("halo_26t", 128),
    halonet50ts=("halo_50ts", 128),
    sehalonet33ts=("halo_se33ts", 128),
    eca_halonext26ts=("halo_eca26ts", 128),
    haloregnetz_b=("halo_regnetz_b", 112),
)


def shake(model: nn.Module) -> None:
    """Norms and biases away from their initial zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.ndim == 1:
                x.add_(torch.rand(x.shape, generator=generator) - 0.2)


@pytest.mark.parametrize("output_stride", [exhaustive(32), 8])
@pytest.mark.parametrize("theirs", [name if name == "halonet26t" else exhaustive(name) for name in HYBRIDS])
def test_timms_model_is_the_same_function(tmp_path, theirs, output_stride):
    """Its weights load and give its maps; gradients too. At the size and stride that timm's blocks divide."""
    ours, size = HYBRIDS[theirs]
    if output_stride == 32:
        size *= 2
    torch.manual_seed(0)
    timms = timm.create_model(theirs, output_stride=output_stride, num_classes=9).eval()
    shake(timms)
    kwargs = dict(output_stride=output_stride, num_classes=9)
    model = load_file(tmp_path, timms.state_dict(), ours, **kwargs)
    features = timm.create_model(ours, features_only=True, output_stride=output_stride).eval()
    features.model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    x = torch.randn(1, 3, size, size)
    expected = timms.forward_intermediates(x, intermediates_only=True)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [size // m.shape[2] for m in maps] == features.feature_info.reduction()
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.std().item())
    if output_stride == 32:
        grads = []
        for m in (timms, model):
            m(x).square().sum().backward()
            grads.append({rename(k): p.grad for k, p in m.named_parameters()})
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[0].items():
            torch.testing.assert_close(grads[1][key], grad, rtol=1e-7, atol=1e-9 * (1 + grad.norm().item()))


SMALL = dict(
    stem="tiered",
    blocks=("CA", "A", "C", "AA"),
    dims=(16, 24, 32, 48),
    widths=(16, 16, 32, 32),
    heads=(2, 2, 4, 4),
    value_ratio=1.5,
    gate="se",
    block=4,
    halo=1,
    num_features=40,
    num_classes=7,
)
INVERTED = dict(stem="3x3", expansion=3, dims=(16, 32, 32, 48), block=3, value_ratio=1.0, act_layer="silu", gate="eca")


def small(**kwargs):
    """Every kind of layer, small enough to run anywhere."""
    torch.manual_seed(0)
    model = timm.create_model("halo_h0", **(SMALL | kwargs))
    shake(model)
    return model


class TestHaloNet(Backbone):
    FIXTURES, NAME, SMALL, small, rename = "halonet", "halo_h0", SMALL, staticmethod(small), staticmethod(rename)
    WHOLE = (
        ("halonet_h0_paper", "halo_h0", {}),
        exhaustive("halonet_h1", "halo_h1", dict(heads=(8, 8, 8, 8))),
        exhaustive("halonet_h3_paper", "halo_h3", {}),
        exhaustive("halonet_h5_paper", "halo_h5", {}),
        ("halonet26t", "halo_26t", {}),
        ("eca_halonext26ts", "halo_eca26ts", {}),
    )
    COUNTS = dict(
        halo_h0=5_502_248,
        halo_h1=8_101_352,
        halo_h2=9_405_608,
        halo_h3=11_842_792,
        halo_h4=19_103_464,
        halo_h5=30_718_952,
        halo_h6=43_458_280,
        halo_h7=67_434_728,
        halo_26t=12_480_288,
        halo_50ts=22_733_280,
        halo_se33ts=13_691_712,
        halo_eca26ts=10_756_885,
        halo_regnetz_b=11_680_072,
    )
    MACS = dict(  # of convolutions and of attention
        halo_h0=(1.58, 0.68),
        halo_h1=(2.13, 0.76),
        halo_h2=(2.42, 0.78),
        halo_h3=(4.33, 1.65),
        halo_h4=(9.33, 2.38),
        halo_h5=(21.98, 9.67),
        halo_h6=(40.4, 11.7),
        halo_h7=(96.5, 23.9),  # at 640: nobody says how blocks of 10 are to cut the maps of 600
    )
    MACS_RTOL = 0.01
    STRIDES = (2, 4, 8, 16, 32)
    SIZED = dict(resnet={}, inverted=INVERTED)
    CHANNELS_LAST = True
    PREFIXES = ("",)
    test_other_weights_are_refused_in_one_sentence = None  # test_weights_of_other_models_are_refused_in_one_sentence
    IMPOSSIBLE = (
        (dict(dims=(32, 64)), "blocks, dims, widths and heads must be equally long"),
        (dict(blocks=("CA", "X", "C", "A")), "blocks must hold one or more of the letters A and C for each stage"),
        (dict(heads=(2, 5, 4, 4)), "heads must divide the 24 channels of the values, got 5"),
        (dict(stem="deep"), "stem must be one of 7x7, tiered, tiered_nopool, 3x3, got 'deep'"),
        (dict(output_stride=4), "output_stride must be 8, 16 or 32, got 4"),
        (dict(gate="cbam"), "gate must be 'se', 'eca' or None, got 'cbam'"),
        (dict(group_width=5), "group_width must divide the 16 channels of a block, got 5"),
    )
    BLOCKS = 6
    CHECKPOINT_MODE, CHECKPOINT_RTOL = False, 1e-12  # in training, norms would update their statistics twice
    LEARNING, STEPS, RATE, FALL = {}, 12, 1e-2, 0.5
    COMPILED = {
        "two stages": dict(blocks=("CA", "A"), dims=(16, 24), widths=(16, 16), heads=(2, 2)),
        "small": exhaustive({}),
    }
    COMPILED_SIZE = (72, 64)

    def file(self, weights):
        return weights

    def outputs(self, model, x):
        features, maps = model.forward_intermediates(x)
        stages = {f"stage{i}": m for i, m in enumerate(maps) if i}
        return {"stem": model.stem(x)} | stages | {"features": features, "logits": model.forward_head(features)}

    def test_macs(self, name, giga):
        model = timm.create_model(name, device="meta", dtype=torch.float32).eval()
        counted = [0, 0]

        def conv(module, args, out):
            counted[0] += out.numel() * module.weight[0].numel()

        def attention(module, args, out):
            window = (module.block + 2 * module.halo) ** 2
            keys = module.q.out_channels * out.shape[2] * out.shape[3]
            counted[1] += (keys + out.numel()) * window

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(conv)
            elif isinstance(module, HaloAttention):
                module.register_forward_hook(attention)
        size = 640 if name == "halo_h7" else model.default_cfg["input_size"][1]
        model.forward_features(torch.empty(1, 3, size, size, device="meta", dtype=torch.float32))
        assert [n / 1e9 for n in counted] == pytest.approx(giga, rel=self.MACS_RTOL)


def test_trained_weights_are_timms():
    assert set(timm.list_models(module="halonet")) == set(halonet.VARIANTS)
    assert "halo_26t.a1h_in1k" in timm.list_pretrained("halo_*")
    for name, (theirs, tag, _) in halonet.TRAINED.items():
        ours, timms = (timm.get_pretrained_cfg(n) for n in (f"{name}.{tag}", f"{theirs}.{tag}"))
        for field in ("url", "hf_hub_id", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std"):
            assert getattr(ours, field) == getattr(timms, field), (name, field)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 13), (8, 3), (17, 8)], ids=str)
def test_a_map_that_blocks_do_not_divide_is_as_if_padded(size, stride):
    torch.manual_seed(0)
    layer = HaloAttention(12, 24, 4, 5, block=4, halo=1, stride=stride)
    x = torch.randn(2, 12, *size)
    H, W = size
    whole = layer(F.pad(x, (0, -W % 4, 0, -H % 4)))
    out = layer(x)
    assert out.shape == (2, 24, -(-H // stride), -(-W // stride))
    torch.testing.assert_close(out, whole[:, :, : out.shape[2], : out.shape[3]], rtol=1e-12, atol=1e-12)


def test_stride_that_does_not_divide_the_block_is_a_mean():
    torch.manual_seed(0)
    strided, plain = (HaloAttention(12, 24, 4, 5, block=3, halo=2, stride=s) for s in (2, 1))
    strided.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 9, 8)
    out, full = strided(x), plain(x)
    assert out.shape == (2, 24, 5, 4)
    torch.testing.assert_close(out[:, :, :4], F.avg_pool2d(full, 2))
    torch.testing.assert_close(out[:, :, 4], F.avg_pool2d(full[:, :, 8:], (1, 2))[:, :, 0])


def test_scaled_positions():
    """scale_pos scales what the tables add: the same as tables that are smaller by head_dim ** -0.5."""
    torch.manual_seed(0)
    plain, scaled = HaloAttention(12, 24, 4, 16, 4, 1), HaloAttention(12, 24, 4, 16, 4, 1, scale_pos=True)
    weights = plain.state_dict()
    scaled.load_state_dict({k: v * 4 if k.endswith("_rel") else v for k, v in weights.items()})
    x = torch.randn(2, 12, 8, 8)
    torch.testing.assert_close(plain(x), scaled(x))
    model = small(scale_pos=True)
    assert model.stages[0][1].mix[0].scale_pos and not small().stages[0][1].mix[0].scale_pos


def test_final_convolution_counts_as_the_norm():
    x = torch.randn(1, 3, 64, 64)
    model = small().eval()
    features, raw = model.forward_intermediates(x)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    assert raw[-1].shape[1] == 48 and torch.equal(last, features)
    assert torch.equal(features, model.forward_features(x))
    getter = small(features_only=True)
    assert getter.feature_info.channels() == [64, 16, 24, 32, 40]


def test_arguments():
    x = torch.randn(2, 3, 64, 64)
    assert small(num_classes=0)(x).shape == (2, 40)
    assert small(num_classes=0, global_pool="")(x).shape == (2, 40, 2, 2)
    assert small(global_pool="avgmax")(x).shape == (2, 7)
    assert small(in_chans=1, num_features=None)(x[:, :1]).shape == (2, 7)
    assert small(output_stride=8).forward_features(x).shape == (2, 40, 8, 8)
    model = small(drop_rate=0.5, drop_path_rate=0.3)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates) and model.head.drop.p == 0.5
    assert not torch.equal(model.train()(x), model(x))
    with pytest.raises(TypeError):
        small(depth=3)
    model = small().eval()
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 40)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3


def test_initial_values():
    """Residual branches start at zero, so that the first blocks pass their shortcuts."""
    torch.manual_seed(0)
    model = timm.create_model("halo_h1")
    block = model.stages[2][3]
    attn = block.mix[0]
    assert not block.conv3.bn.weight.any()
    assert attn.kv.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert attn.height_rel.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert model.stem.conv1.conv.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_weights_of_other_models_are_refused_in_one_sentence():
    model = small()
    with pytest.raises(ValueError, match=r"the weights are not a HaloNet's: they have no 'stages\.0\.0\.conv1_1x1'"):
        checkpoint_filter_fn(timm.create_model("resnet18", device="meta").state_dict(), model)
    with pytest.raises(ValueError, match=r"height_rel is \(15, 8\), the model's \(11, 8\): its rows are 2 \* \(block"):
        checkpoint_filter_fn(small(halo=2).state_dict(), model)
