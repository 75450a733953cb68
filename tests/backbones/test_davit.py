"""DaViT equals the published models and timm's, and does what a timm backbone should."""

import re

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import safetensors.torch
import timm
import torch
from saccade.backbones.davit import Block, ChannelAttention, ConvPosEnc, Downsample, Stem, WindowAttention, rename
from saccade.train.runtime import measure
from support import parity
from support.graphs import BACKENDS, compiles_and_exports
from support.levels import exhaustive
from support.parity import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


@pytest.mark.parametrize(("fixture", "name"), [exhaustive("davit_tiny", "davit_t"), ("davit_tiny_150x198", "davit_t")])
def test_equals_published_model(tmp_path, fixture, name):
    want = parity.load("davit", fixture)
    model = load_file(tmp_path, {"state_dict": parity.weights(want)}, name)
    logits, stages = forward_all(model, parity.image(want))
    parity.assert_equal("logits", logits, want["outputs"]["logits"])
    for i, stage in enumerate(stages):
        parity.assert_equal(f"stage{i + 1}", stage, want["outputs"][f"stage{i + 1}"])
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    (logits * parity.seeded(1, logits.shape)).sum().backward()
    parity.assert_gradients(model, want["grads"], rename)


def forward_all(model, x):
    last, stages = model.forward_intermediates(x)
    return model.forward_head(last), stages


@pytest.mark.parametrize(("fixture", "name"), [("davit_tiny_dense_192x256", "davit_t")])
def test_equals_published_dense_backbone(tmp_path, fixture, name):
    want = parity.load("davit", fixture)
    weights = {"state_dict": parity.weights(want)}
    model = load_file(tmp_path, weights, name, features_only=True, out_norms=True)
    maps = model(parity.image(want))
    for i, m in enumerate(maps):
        parity.assert_equal(f"norm{i}", m, want["outputs"][f"norm{i}"])
    every = torch.cat([m.flatten(1) for m in maps], 1)
    parity.assert_equal("all", every, want["outputs"]["all"])
    (every * parity.seeded(1, every.shape)).sum().backward()
    parity.assert_gradients(model.model, want["grads"], rename)


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


COUNTS = dict(
    davit_t=28_360_168,
    davit_s=49_745_896,
    davit_b=87_954_408,
    davit_l=196_811_752,
    davit_h=362_685_416,
    davit_g=1_437_435_880,
)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name, count):
    """Those counted on the published models, or of davit_h and davit_g, for which there is no code, the paper's."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


MACS = dict(davit_t=4.540, davit_s=8.800, davit_b=15.510, davit_l=102.97, davit_h=334, davit_g=1038)


@pytest.mark.parametrize(("name", "giga"), MACS.items())
def test_macs(name, giga):
    """Those of the published file and of the paper, at the default size. The counter leaves the norms' out."""
    model = timm.create_model(name, device="meta", dtype=torch.float32)
    x = torch.empty(1, *model.default_cfg["input_size"], device="meta", dtype=torch.float32)
    assert measure.macs(model, x) / 1e9 == pytest.approx(giga, rel=0.005)


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


SMALL = dict(depths=(1, 1, 2, 1), dims=(32, 32, 64, 64), window_size=3, num_classes=7)


def small(**kwargs):
    """DaViT with every kind of layer, small enough to run anywhere."""
    torch.manual_seed(0)
    return timm.create_model("davit_t", **(SMALL | kwargs))


def to_published(key: str) -> str:
    key = re.sub(r"^stages\.(\d)\.blocks", r"main_blocks.\1", key)
    key = re.sub(r"^stages\.(\d)\.downsample", r"patch_embeds.\1", key).replace("stem.", "patch_embeds.0.")
    key = re.sub(r"^(patch_embeds\.\d)\.conv", r"\1.proj", key).replace("out_norms.", "norm")
    key = key.replace("cpe1", "cpe.0").replace("cpe2", "cpe.1")
    return key.replace("head.norm", "norms").replace("head.fc", "head")


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_published_containers(tmp_path, container, prefix):
    """Weights lie under 'model' or 'state_dict'; a parallel run prefixes 'module.', a detector 'backbone.'."""
    weights = {prefix + to_published(k): torch.rand_like(v) for k, v in small(out_norms=True).state_dict().items()}
    if prefix == "backbone.":
        weights["decode_head.conv_seg.weight"] = torch.zeros(3)
    model = load_file(
        tmp_path, {container: weights, "epoch": 3} if container else weights, "davit_t", **SMALL, out_norms=True
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[prefix + to_published(key)]), key


def test_files_of_one_task_load_into_models_of_the_other(tmp_path):
    """What a file lacks, head or norms, keeps its initial values; what it has beyond is dropped."""
    dense = {to_published(k): v for k, v in small(out_norms=True).state_dict().items() if not k.startswith("head.")}
    classifier = load_file(tmp_path, {"model": dense}, "davit_t", **SMALL)
    assert torch.equal(classifier.stem.conv.weight, dense["patch_embeds.0.proj.weight"])
    assert classifier.head.fc.weight.std() > 0.01
    plain = {to_published(k): v + 1 for k, v in small().state_dict().items()}
    features = load_file(tmp_path, {"state_dict": plain}, "davit_t", **SMALL, out_norms=True, features_only=True).model
    assert torch.equal(features.stem.conv.weight, plain["patch_embeds.0.proj.weight"])
    assert torch.equal(features.out_norms[2].weight, torch.ones(64))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (dict(depths=(1, 1, 1, 1)), "32 of 172 .* do not fit, stages.2.blocks.1.0.cpe1.proj.weight is missing there"),
        (dict(overlapped_patch=True), r"3 of 172 .* is \(32, 32, 3, 3\) there and \(32, 32, 2, 2\) here"),
        (None, "172 of 172 entries of its stages do not fit"),
    ],
    ids=["another depth", "another merge", "another family"],
)
def test_other_weights_are_refused_in_one_sentence(tmp_path, weights, sentence):
    source = timm.create_model("resnet18") if weights is None else small(**weights)
    with pytest.raises(ValueError, match="not the weights of this DaViT: .*" + sentence):
        load_file(tmp_path, source.state_dict(), "davit_t", **SMALL)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(depths=(1, 1, 1)), r"depths and dims must be equally long, got \(1, 1, 1\) and \(32, 32, 64, 64\)"),
        (dict(dims=(32, 48, 64, 64)), "dims must be multiples of head_dim=32, got"),
        (dict(window_size=0), "window_size must be at least 1, got 0"),
    ],
)
def test_impossible_models_are_refused_in_one_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**kwargs)


@pytest.mark.parametrize("overlapped_patch", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (97, 45), (1, 5)], ids=str)
def test_any_size(size, overlapped_patch):
    model = small(features_only=True, overlapped_patch=overlapped_patch).eval()
    for level, m in enumerate(model(torch.randn(2, 3, *size))):
        assert m.shape[2:] == tuple(-(-n // (4 * 2**level)) for n in size)
        assert m.is_contiguous(memory_format=torch.channels_last) and m.isfinite().all()


def test_images_do_not_see_each_other():
    model, x = small().eval(), torch.randn(3, 3, 75, 90)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_drop_path_grows_from_block_to_block():
    """One rate for each attention block, as published; timm has one for each pair."""
    blocks = [m for m in small(drop_path_rate=0.9).modules() if isinstance(m, Block)]
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.9, 10), rtol=0, atol=1e-7)
    assert isinstance(blocks[0].attn, WindowAttention) and isinstance(blocks[1].attn, ChannelAttention)


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


def test_gradient_checkpointing_changes_nothing():
    x, results = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_out_norms_do_not_reach_the_next_stage():
    x = torch.randn(1, 3, 64, 64)
    plain, normed = small().eval(), small(out_norms=True).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x), normed(x))
    for raw, out in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (plain, normed))):
        centred = raw - raw.mean(1, keepdim=True)
        torch.testing.assert_close(out, centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt())


def test_pruned_model_keeps_the_norms_of_its_maps():
    x, model = torch.randn(1, 3, 64, 64), small(out_norms=True).eval()
    want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    got = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert len(model.stages) == 3 and len(list(model.out_norms.parameters())) == 4
    assert model.num_features == 64 and model.forward_head(model.forward_features(x)).shape[1] == 64


def test_bfloat16_autocast_is_close():
    torch.set_default_dtype(torch.float32)
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    exact = model.double()(x.double())
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.05


def test_loss_falls():
    torch.set_default_dtype(torch.float32)
    model = small(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), drop_path_rate=0.1)
    x, target = torch.randn(16, 3, 32, 32), torch.arange(16) % 7
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@BACKENDS
def test_compiles_and_exports(backend):
    torch.set_default_dtype(torch.float32)
    compiles_and_exports(small(dims=(32, 64), depths=(1, 1)), (20, 24), backend)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
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
