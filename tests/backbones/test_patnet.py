"""PATNet equals the published models, is the same when fused, and does what a timm backbone should."""

import copy
import functools

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.patnet import (
    AttentionMixer,
    Block,
    FusedBlock,
    GatedMixer,
    Mlp,
    RelativeAttention,
    SpatialAttention,
    checkpoint_filter_fn,
    rename,
)
from saccade.ops import relative_bias_attention
from saccade.train.runtime.distributed import SyncBatchNorm
from support import parity
from support.backbones import Pyramid
from support.levels import exhaustive
from support.parity import load_file
from timm.models import reparameterize_model, save_for_hf
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


def block(dim: int, sf: bool = False, spatial: bool = False, act: str = "gelu") -> Block:
    mixer = AttentionMixer(dim, 4, 0.1) if sf else GatedMixer(dim)
    return Block(mixer, Mlp(dim, act), SpatialAttention(dim) if spatial else nn.Identity(), sf, 0.0)


LAYERS = dict(  # the layer, and where it lies in a published model
    op_pat_ch=(lambda: GatedMixer(32), "stages.0.blocks.0.spatial_mixing."),
    op_pat_sf=(lambda: AttentionMixer(64, 4, 0.1), "stages.6.blocks.0.spatial_mixing."),
    op_pat_sp=(lambda: SpatialAttention(32), "stages.0.blocks.0.mlp.4."),
    op_block_ch=(lambda: block(32), "stages.0.blocks.0."),
    op_block_ch_sp=(lambda: block(32, spatial=True, act="relu"), "stages.0.blocks.0."),
    op_block_sf=(lambda: block(32, sf=True), "stages.6.blocks.0."),
)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    want, (build, place) = parity.load("patnet", name), LAYERS[name]
    module = build().eval()
    depth = 4 if "block" in name else 5  # components of our name of the place

    def ours(key: str) -> str:
        return rename(place + key).split(".", depth)[depth]

    weights = {ours(k): v for k, v in parity.weights(want).items()}
    own = module.state_dict()
    module.load_state_dict(own | {k: v.reshape(own[k].shape) for k, v in weights.items()})
    x = parity.image(want).requires_grad_()
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    parity.assert_equal("out", y, want["outputs"]["out"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    parity.assert_gradients(module, want["grads"], ours)


SMALL = dict(depths=(1, 1, 2, 2), dims=(8, 18, 16, 32), head_hidden_size=24, num_classes=7, attn_heads=2)


def small(name: str = "patnet_t0", **kwargs):
    """Every kind of layer, small enough to run anywhere, with statistics that BatchNorms may have after training."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | kwargs))
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(std=0.2)
                m.running_mean.normal_(std=0.2)
                m.running_var.uniform_(0.5, 1.5)
            if isinstance(m, nn.Linear | nn.Conv2d):
                m.weight.normal_(std=m.weight[0].numel() ** -0.5)
            if isinstance(m, RelativeAttention):
                m.table.normal_()
    return model


class TestPATNet(Pyramid):
    FIXTURES, NAME, SMALL, small, rename = "patnet", "patnet_t0", SMALL, staticmethod(small), staticmethod(rename)
    FORMS = {"plain": {}, "PAT_sp": dict(spatial_attn=True)}
    WHOLE = (
        ("patnet_t0_256x192", "patnet_t0", {}),
        ("patnet_t0_sp_6heads", "patnet_t0", dict(spatial_attn=True, attn_heads=6)),
        exhaustive("patnet_t0", "patnet_t0", {}),
        exhaustive("patnet_t0_sp", "patnet_t0", dict(spatial_attn=True)),
        exhaustive("patnet_t1", "patnet_t1", {}),
        exhaustive("patnet_t1_6heads", "patnet_t1", dict(attn_heads=6)),
    )
    DENSE = (("patnet_t1_det", "patnet_t1", dict(out_norms=True)),)
    MAPS = ("stage1", "stage2", "stage3", "stage4")
    COUNTS = dict(  # without PAT_sp, and with
        patnet_t0=(3_486_160, 3_558_240),
        patnet_t1=(5_985_552, 6_144_552),
        patnet_t2=(12_269_816, 12_650_424),
        patnet_s=(28_013_304, 28_975_704),
        patnet_m=(59_179_000, 61_366_776),
        patnet_l=(100_641_336, 104_465_336),
    )
    MACS = dict(  # without PAT_sp, and with
        patnet_t0=(0.235, 0.247),
        patnet_t1=(0.521, 0.546),
        patnet_t2=(1.039, 1.087),
        patnet_s=(2.716, 2.843),
        patnet_m=(6.693, 7.022),
        patnet_l=(11.909, 12.502),
    )
    SIZES = ((33, 70), (31, 17), (16, 16), (1, 5))
    SIZED = {"plain": {}}
    FILES = {"PAT_sp": dict(spatial_attn=True)}
    PREFIXES = ("", "model.", "module.", "backbone.")  # 'model.' is a trainer's
    ALIENS = {
        "another depth": (dict(depths=(1, 1, 1, 2)), "do not fit, stages.2.blocks.1.mixer.gate is missing there"),
        "with PAT_sp": (
            dict(spatial_attn=True),
            r"do not fit, stages.0.blocks.0.spatial.gate.weight is \(1, 4\) there and missing here",
        ),
        "other heads": (
            dict(attn_heads=3),
            r"2 of \d+ .* stages.3.blocks.0.mixer.attn.table is \(3, 81\) there and \(2, 81\) here",
        ),
        "another family": ("test_resnet", "105 of 122 entries of its stages do not fit"),
    }
    IMPOSSIBLE = (
        (dict(depths=(1, 1, 1)), r"depths and dims must be equally long, got \(1, 1, 1\) and \(8, 18, 16, 32\)"),
        (dict(dims=(2, 4, 8, 32)), r"dims must be at least 4, got \(2, 4, 8, 32\)"),
        (dict(attn_heads=7), "attn_heads must divide the 24 channels that attend, got 7"),
        (dict(attn_heads=0), "attn_heads must divide the 24 channels that attend, got 0"),
        (dict(global_pool="catavgmax"), "global_pool must leave the width as it is, got 'catavgmax'"),
    )
    BLOCKS = 6
    CHECKPOINT_RTOL = 1e-10
    EPS = None  # BatchNorms
    STEPS, RATE = 20, 4e-3
    COMPILED = {
        "plain": dict(dims=(8, 16), depths=(1, 1), spatial_attn=True),
        "fused": dict(dims=(8, 16), depths=(1, 1), spatial_attn=True, fused=True),
    }
    COMPILED_SIZE = (16, 24)

    def initial(self, **kwargs):
        torch.manual_seed(0)
        return timm.create_model("patnet_t0", **SMALL, **kwargs)

    def same(self, model):
        fused = copy.deepcopy(model)
        getattr(fused, "model", fused).fuse()
        return [model, fused]

    def test_parameter_counts(self, name, count):
        for spatial, expected in zip((False, True), count):
            model = timm.create_model(name, spatial_attn=spatial, device="meta")
            assert sum(p.numel() for p in model.parameters()) == expected
        six = timm.create_model(name, attn_heads=6, device="meta")  # and PAT_sp as published
        more = 162 * len(six.stages[3].blocks)
        assert sum(p.numel() for p in six.parameters()) == count[name == "patnet_t1"] + more

    def test_macs(self, name, giga):
        """Those counted on the published code, where a BatchNorm has two for each element."""
        for spatial, expected in zip((False, True), giga):
            model = timm.create_model(name, spatial_attn=spatial, device="meta", dtype=torch.float32)
            norms = 0
            for stage, info in zip(model.stages, model.feature_info):
                dim, gated = info["num_chs"], isinstance(stage.blocks[0].mixer, GatedMixer)
                each = 2 * dim + gated * (dim - dim // 4) + spatial * dim
                norms += (224 // info["reduction"]) ** 2 * (dim + len(stage.blocks) * each)
            assert (self.macs(model) + 2 * norms) / 1e9 == pytest.approx(expected, rel=self.MACS_RTOL)

    def side(self, n, stride):
        """Down to one position in the third stage, where PAT_ch stands; below 32 pixels zeros make up a patch."""
        return max(1, n // stride)

    def test_published_containers(self, form, container, prefix):
        file, model = file_and_model(**form)
        weights = {prefix + k: v for k, v in file.items()}
        content = {container: weights, "epoch": 3} if container else weights
        state = checkpoint_filter_fn(content, model)
        own = model.state_dict()
        assert state.keys() == own.keys()
        for key, value in weights.items():
            key = rename(key.removeprefix(prefix))
            assert torch.equal(state[key].flatten(), value.flatten()), key
            assert state[key].shape == own[key].shape, key


@functools.cache
def file_and_model(**kwargs):
    model = timm.create_model("patnet_t0", device="meta", **kwargs)
    return parity.weights(parity.load("patnet", "patnet_t0_sp")), model


def test_drop_path_spares_attention():
    last = small(drop_path_rate=0.9).stages[3].blocks[-1].eval()
    x = torch.randn(2, 4, 4, 32)
    attended = x + last.mixer(x)
    last.drop_path.drop_prob = 1.0
    last.drop_path.train()
    torch.testing.assert_close(last(x), attended)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_fused_is_equal(act, spatial):
    """On odd maps, in odd widths; in both forms of its MLPs, of which a CPU runs large ones in parts where no gradient
    is asked for. No BatchNorm is left but the gates'."""
    model = small(act_layer=act, spatial_attn=spatial).eval()
    fused = copy.deepcopy(model).fuse()
    for grad, size in ((True, (75, 110)), (False, (515, 526))):
        x = torch.randn(2, 3, *size)
        with torch.set_grad_enabled(grad):
            last, maps = model.forward_intermediates(x)
            fused_last, fused_maps = fused.forward_intermediates(x)
            torch.testing.assert_close(fused.forward_head(fused_last), model.forward_head(last), rtol=1e-9, atol=1e-9)
        for a, b in zip(maps, fused_maps):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * a.std().item())
    norms = [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(name.endswith("gate_norm") for name in norms)
    assert fused.fuse() is fused and torch.equal(copy.deepcopy(fused)(x), fused(x))


@pytest.mark.parametrize("name", ["patnet_t0", "patnet_t1"])
def test_fused_model_is_stored_and_loaded(tmp_path, name):
    """By timm as a whole, and its weights alone; weights of the other form are refused in one sentence."""
    plain, x = small(name).eval(), torch.randn(2, 3, 64, 64)
    fused = copy.deepcopy(plain).fuse()
    expected = fused(x)
    save_for_hf(fused, tmp_path / "stored", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}/stored", pretrained=True, dtype=torch.float64).eval()
    assert any(isinstance(m, FusedBlock) for m in loaded.modules()) and torch.equal(loaded(x), expected)
    loaded = load_file(tmp_path, fused.state_dict(), name, **SMALL, fused=True)
    assert torch.equal(loaded(x), expected) and torch.equal(loaded.fuse()(x), expected)
    with pytest.raises(ValueError, match=r"^the weights are of a fused PATNet: load them with fused=True$"):
        load_file(tmp_path, fused.state_dict(), name, **SMALL)
    with pytest.raises(ValueError, match=r"^the weights are not of a fused PATNet: load them with fused=False, then"):
        load_file(tmp_path, plain.state_dict(), name, **SMALL, fused=True)


def test_timm_fuses_it():
    model, x = small(spatial_attn=True).eval(), torch.randn(2, 3, 64, 64)
    features = small(features_only=True, out_indices=(1, 2)).eval()
    for whole, of in ((model, lambda y: y), (features, lambda y: y[1])):
        fused = reparameterize_model(nn.Sequential(whole))
        assert any(isinstance(m, FusedBlock) for m in fused.modules())
        torch.testing.assert_close(of(fused(x)), of(whole(x)), rtol=1e-9, atol=1e-9)


def test_fusing_in_training_mode_is_refused_in_one_sentence():
    with pytest.raises(
        RuntimeError, match=r"^fuse\(\) merges BatchNorms as they are at inference: call eval\(\) first$"
    ):
        small().fuse()


@pytest.mark.parametrize("training", [False, True])
def test_one_position_has_no_deviation(training):
    """The published code gives NaN there."""
    torch.manual_seed(0)
    mixer = GatedMixer(16).train(training)
    twice = copy.deepcopy(mixer)
    x = torch.randn(4, 1, 1, 16)
    y = mixer(x)
    mean = x[..., 4:].flatten(1)
    t = mean @ mixer.gate[..., 0].mT
    var, centre = torch.var_mean(t, 0, correction=0) if training else (torch.ones(12), torch.zeros(12))
    gated = mean * nn.functional.hardsigmoid((t - centre) / (var + 1e-5).sqrt())
    var, centre = torch.var_mean(gated, 0, correction=0) if training else (torch.ones(12), torch.zeros(12))
    torch.testing.assert_close(y[:, 0, 0, 4:], (gated - centre) / (var + 1e-5).sqrt())
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters()) and not mixer.gate.grad[..., 1].any()
    # Many equal positions have the same mean and no deviation either, through the operator.
    equal = twice(x.expand(-1, 3, 5, -1))
    torch.testing.assert_close(equal[:, 1, 2, 4:], y[:, 0, 0, 4:])


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_maps_are_channels_last(spatial, fused):
    model = small(spatial_attn=spatial, features_only=True).eval()
    if fused:
        model.model.fuse()
    for m in model(torch.randn(2, 3, 70, 97)):
        assert m.is_contiguous(memory_format=torch.channels_last)


def test_converted_norms_run_by_themselves():
    """As where processes share their statistics. Outputs, gradients and statistics are those of the operators."""
    x, results = torch.randn(3, 3, 64, 64), []
    for converted in (False, True):
        model = small(spatial_attn=True, attn_drop_rate=0.0)
        if converted:
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(parent, name, Alone(child))
        y = model(x)
        y.square().sum().backward()
        grads = [p.grad for _, p in sorted(model.named_parameters())]
        results.append([y, *grads, *(b.double() for _, b in sorted(model.named_buffers()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Alone(SyncBatchNorm):
    """Of the only process there is."""

    def _normalise(self, x):
        return nn.modules.batchnorm._BatchNorm.forward(self, x)


def test_training_drops_a_tenth_of_the_attention():
    """Of probabilities and outputs, as published: its mean over many draws is what inference gives."""
    torch.manual_seed(0)
    mixer = AttentionMixer(32, 4, 0.1)
    with torch.no_grad():
        mixer.attn.table.normal_()
    x = torch.randn(1, 5, 4, 32)
    exact = mixer.eval()(x)
    many = mixer.train()(x.expand(4000, -1, -1, -1))
    assert (many[..., 8:] == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (many.mean(0) - exact[0]).abs().max() < 0.05
    without = AttentionMixer(32, 4, 0.0)
    without.load_state_dict(mixer.state_dict())
    assert torch.equal(without.train()(x), exact)
    qkv = torch.randn(2, 5, 4, 3, 24)  # the form that drops, where nothing is dropped
    want = without.attn.eval().attend_with_dropout(qkv)
    got = relative_bias_attention(qkv, 4, without.attn.table)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_statistics_and_counts_as_batchnorm_keeps_them():
    model, x = small(spatial_attn=True).train(), torch.randn(3, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(x)
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    counts = [v.item() for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts and set(counts) == {1}


def test_frozen_norms_stay():
    """`eval()` on the BatchNorms alone, as detectors do."""
    model, x = small(spatial_attn=True, attn_drop_rate=0.0), torch.randn(1, 3, 64, 64)
    want = model.eval()(x)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_head():
    model = small().eval()
    last = model.forward_features(torch.randn(2, 3, 64, 64))
    features = nn.functional.gelu(last.mean((2, 3)) @ model.head.hidden.weight.mT)
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), features)
    torch.testing.assert_close(model.forward_head(last), model.head.fc(features))
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 24, 2, 3)


def test_arguments_reach_the_layers():
    model = small(in_chans=4, act_layer="relu", drop_rate=0.3, attn_drop_rate=0.2, global_pool="max", num_classes=5)
    assert model.stem.conv.in_channels == 4 and model.head.drop.p == 0.3 and model.head.fc.out_features == 5
    assert isinstance(model.stages[0].blocks[0].mlp.act, nn.ReLU) and isinstance(model.head.act, nn.ReLU)
    assert model.stages[3].blocks[0].mixer.attn.drop == 0.2
    last = model.eval().forward_features(torch.randn(2, 4, 64, 64))
    pooled = (last.amax((2, 3)) @ model.head.hidden.weight.mT).relu()
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), pooled)
    with pytest.raises(TypeError, match="attention_heads"):
        small(attention_heads=2)
