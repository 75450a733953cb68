"""Agent-DeiT, -PVT, -Swin and -CSwin equal the published models, and do what timm backbones should."""

import math

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.backbones.agent import (
    TABLES,
    AgentAttention,
    StripeAttention,
    WindowAttention,
    rename,
)
from support import parity
from support.backbones import Pyramid
from support.levels import exhaustive
from support.parity import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


def gradients(fixture: dict) -> dict[str, float]:
    """The published norms, PVT's of queries and of keys and values as of the one projection that they are here."""
    norms = {}
    for key, norm in fixture["grads"].items():
        key = key.replace(".q.", ".qkv.").replace(".kv.", ".qkv.")
        norms[key] = math.hypot(norms.get(key, 0.0), norm)
    return norms


def forward_all(model, x):
    """Logits, and what lies between under the fixtures' names."""
    if "DeiT" in type(model).__name__:
        tokens, pairs = model.forward_intermediates(x, [0, 3, 7], return_prefix_tokens=True, output_fmt="NLC")
        blocks = [torch.cat((cls, rest), 1) for rest, cls in pairs]
        return model.forward_head(tokens), dict(zip(("block1", "block4", "block8", "tokens"), (*blocks, tokens)))
    last, stages = model.forward_intermediates(x)
    return model.forward_head(last), {f"stage{i + 1}": stage for i, stage in enumerate(stages)}


PYRAMID = dict(dims=(16, 32, 32, 64), heads=(1, 2, 2, 4), depths=(1, 2, 3, 2), agents=(1, 4, 9, 4))
SMALL = dict(  # every kind of layer of each family, small enough to run anywhere
    agent_deit_t=dict(dim=32, depth=3, heads=2, agents=9, agent_blocks=2),
    agent_pvt_t=PYRAMID,
    agent_swin_t=PYRAMID | dict(agent_blocks=(1, 2, 1, 0)),
    agent_cswin_t=PYRAMID | dict(heads=(2, 2, 2, 4), agent_blocks=(1, 1, 1, 0)),
)
FAMILIES = pytest.mark.parametrize("name", SMALL)


def options(name: str, **kwargs) -> dict:
    return dict(img_size=64, num_classes=7) | SMALL[name] | kwargs


def small(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options(name, **kwargs))


def agent(name: str, **kwargs) -> dict:
    return dict(name=f"agent_{name}_t", **kwargs)


class TestAgent(Pyramid):
    FIXTURES, small, rename = "agent", staticmethod(small), staticmethod(rename)
    FORMS = {name: dict(name=name) for name in SMALL}
    WHOLE = (
        ("agent_deit_tiny_224", "agent_deit_t", dict(img_size=224)),
        exhaustive("agent_deit_tiny_320", "agent_deit_t", dict(img_size=320)),
        exhaustive("agent_pvt_tiny_224", "agent_pvt_t", dict(img_size=224)),
        exhaustive("agent_pvt_tiny_256", "agent_pvt_t", dict(img_size=256)),  # make test has its dense form
        ("agent_swin_tiny_224", "agent_swin_t", dict(img_size=224)),
        exhaustive("agent_swin_tiny_288", "agent_swin_t", dict(img_size=288)),
        ("agent_cswin_tiny_224", "agent_cswin_t", dict(img_size=224)),
    )
    DENSE = (  # `features_only` is their form; Swin's has norms behind its stages
        ("downstream_pvt_tiny_256x320", "agent_pvt_t", {}),
        exhaustive("downstream_swin_tiny_256x320", "agent_swin_t", dict(out_norms=True)),
    )
    MAPS = ("stage1", "stage2", "stage3", "stage4", "features")
    COUNTS = {  # a tag's resolution is that of its tables
        "agent_deit_t": 6_015_640,
        "agent_deit_s": 22_647_112,
        "agent_deit_s.untrained_448": 23_070_472,
        "agent_deit_b": 87_204_904,
        "agent_pvt_t": 11_570_352,
        "agent_pvt_s": 20_635_066,
        "agent_pvt_m": 35_921_746,
        "agent_pvt_m.untrained_256": 36_083_682,
        "agent_pvt_l": 48_738_180,
        "agent_swin_t": 28_902_964,
        "agent_swin_s": 49_666_684,
        "agent_swin_s.untrained_288": 49_707_964,
        "agent_swin_b": 88_095_096,
        "agent_swin_b.untrained_384": 88_305_016,
        "agent_cswin_t": 20_458_672,
        "agent_cswin_s": 32_814_100,
        "agent_cswin_b": 73_249_696,
        "agent_cswin_b.untrained_384": 73_328_416,
    }
    MACS = dict(
        agent_deit_t=1.176,
        agent_deit_s=4.443,
        agent_deit_b=17.552,
        agent_pvt_t=2.000,
        agent_pvt_s=3.978,
        agent_swin_t=4.528,
        agent_swin_b=15.444,
        agent_cswin_t=4.315,
    )
    MACS_RTOL = 0.01
    SIZES = ((64, 64), (33, 70), (97, 45), (160, 96), (3, 20))
    test_published_containers = None  # each host has its own: test_containers
    ALIENS = {
        f"{ours}, {case}": (source, r"\d+ of \d+ entries of its \w+ do not fit", agent(ours))
        for ours, case, source in (
            ("deit", "other agents", agent("deit", agents=16)),  # whose tables cannot be resized in a file
            ("deit", "more blocks of agents", agent("deit", agent_blocks=3)),
            ("deit", "another family", "deit_tiny_patch16_224"),
            ("swin", "another host", agent("cswin")),
            ("swin", "another depth", agent("swin", depths=(1, 2, 4, 2))),
            ("pvt", "another host", agent("deit")),
        )
    }
    IMPOSSIBLE = (
        (agent("deit", img_size=100), "img_size must be a multiple of 16, got 100"),
        (agent("swin", img_size=(224, 200)), r"img_size must be a multiple of 32, got \(224, 200\)"),
        (agent("pvt", agents=(9, 16, 48, 49)), "agents must be square numbers, as they form a grid, got 48"),
        (agent("swin", dense_agents=(9, 16, 50, 49)), "agents must be square numbers, as they form a grid, got 50"),
        (agent("deit", agents=10), "agents must be square numbers, as they form a grid, got 10"),
        (agent("deit", heads=5), "heads must divide dim, got 5 heads for 32 channels"),
        (agent("deit", global_pool="max"), "global_pool must be 'token', 'avg' or '', got 'max'"),
        (agent("cswin", heads=(2, 2, 5, 4)), "heads must divide dims, got 5 heads for 32 channels"),
        (agent("cswin", heads=(2, 1, 2, 4)), "heads of striped blocks must be even, half for each direction, got 1"),
        (agent("swin", depths=(1, 1)), "depths must have one entry for each of the four stages"),
        (agent("pvt", agent_blocks=(1, 1, 1, 1)), "agent_blocks must be None for 'pvt'"),
        (agent("pvt", host="vit"), "host must be 'pvt', 'swin' or 'cswin', got 'vit'"),
    )
    ROUNDED_SIZE = (80, 64)
    LEARNING = dict(drop_path_rate=0.1, drop_rate=0.1)
    IMAGES, STEPS, FALL = (7, 3, 64, 64), 12, 0.7
    NORMED = agent("swin")
    BACKENDS = ("aot_eager",)
    COMPILED = {
        "swin": agent("swin", depths=(1, 1, 1, 1)),
        "deit": exhaustive(agent("deit", depth=2, agent_blocks=1)),
        "pvt": exhaustive(agent("pvt", depths=(1, 1, 1, 1))),
        "cswin": exhaustive(agent("cswin", depths=(1, 1, 1, 1))),
    }

    def options(self, name, **kwargs):
        return dict(name=name) | options(name, **kwargs)

    def file(self, weights):
        return {"model": weights}

    def outputs(self, model, x):
        logits, outputs = forward_all(model, x)
        return outputs | {"logits": logits}

    def check_gradients(self, model, want):
        parity.assert_gradients(model, gradients(want), rename)

    def macs(self, model):
        macs = super().macs(model)
        for layer in model.modules():
            if isinstance(layer, AgentAttention):  # pools by a matrix product, which the published count does not
                macs -= layer.grid[0] * layer.grid[1] * layer.size[0] * layer.size[1] * layer.dwc.in_channels
        return macs

    def test_any_size(self, form, size):
        """Hosts round up or down."""
        model = small(**form, features_only=True).eval()
        for info, m in zip(model.feature_info.get_dicts(), model(torch.randn(2, 3, *size)), strict=True):
            most = [-(-n // info["reduction"]) for n in size]
            assert all(max(1, n - 1) <= side <= n for side, n in zip(m.shape[2:], most))
            assert m.isfinite().all() and m.shape[:2] == (2, info["num_chs"])


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("transfer_deit_tiny_224to448", "agent_deit_t"),
        exhaustive("transfer_swin_tiny_224to288", "agent_swin_t"),
    ],
)
def test_resizes_weights_as_the_published_loader(tmp_path, fixture, name):
    want = parity.load("agent", fixture)
    x = parity.image(want)
    model = load_file(tmp_path, {"model": parity.weights(want)}, name, img_size=x.shape[-1])
    own = model.state_dict()
    with torch.no_grad():
        logits, outputs = forward_all(model, x)
    outputs["logits"] = logits
    for key, expected in want["outputs"].items():
        if key.startswith("state:"):
            outputs[key] = as_published(own[rename(key.removeprefix("state:"))], key)
        parity.assert_equal(key, outputs[key], expected)


def as_published(value, key):
    """One of our tables in the published layout."""
    if "relative" in key:
        return value.flatten(1).mT
    heads, agents, n = value.shape
    shapes = dict(
        ah=(heads, agents, n, 1), aw=(heads, agents, 1, n), ha=(heads, n, 1, agents), wa=(heads, 1, n, agents)
    )
    kind = key.rpartition(".")[2][:2]
    if kind not in shapes:
        return value
    return (value.mT if kind in ("ha", "wa") else value).reshape(1, *shapes[kind])


# name -> how the layer is built
LAYERS = dict(
    module_deit_d64_h4_w7_a9=dict(dim=64, heads=4, size=(7, 7), agents=9, token=True),
    module_pvt_d64_h1_hw16_a9=dict(dim=64, heads=1, size=(16, 16), agents=9),
    module_swin_d64_h2_w8_a4=dict(dim=64, heads=2, size=(8, 8), agents=4),
    module_swin_d96_h3_w14_a9=dict(dim=96, heads=3, size=(14, 14), agents=9),
    module_downstream_pvt_d64_h2_9x12_a6x8=dict(dim=64, heads=2, size=(8, 8), agents=16),
    module_downstream_swin_d64_h2_10x13_a5x6=dict(dim=64, heads=2, size=(14, 14), agents=9),
)
RUN = dict(  # the maps and the grids of agents that the downstream ones run at
    module_downstream_pvt_d64_h2_9x12_a6x8=((9, 12), (6, 8)),
    module_downstream_swin_d64_h2_10x13_a5x6=((10, 13), (5, 6)),
)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    want = parity.load("agent", name)
    module = AgentAttention(**LAYERS[name]).eval()
    size, module.grid = RUN.get(name, (module.size, module.grid))
    module.resize_agents = name in RUN
    weights = {}
    for key, value in parity.weights(want).items():
        key = rename("." + key.removeprefix("attn."))[1:]
        weights[key] = TABLES[key](value) if key in TABLES else value
    if "q.weight" in weights:
        for kind in ("weight", "bias"):
            weights[f"qkv.{kind}"] = torch.cat((weights.pop(f"q.{kind}"), weights.pop(f"kv.{kind}")))
    module.load_state_dict(weights)
    x = parity.image(want).requires_grad_()
    y = module(x, size)
    parity.assert_equal("out", y, want["outputs"]["out"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    norms = {f".{key.removeprefix('attn.')}": norm for key, norm in want["grads"].items()}
    parity.assert_gradients(module, gradients(dict(grads=norms)), lambda key: rename(key)[1:])


@FAMILIES
def test_features_equal_the_classifiers(name):
    """At the size of the tables: unless in the published dense form, which `dense_agents` asks for."""
    x = torch.randn(1, 3, 64, 64)
    published = name in ("agent_pvt_t", "agent_swin_t")
    classifier, features = small(name).eval(), small(name, features_only=True).eval()
    maps = classifier.forward_intermediates(x, 3, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, features(x)[-3:])) != published
    if published:
        features = small(name, features_only=True, dense_agents=()).eval()
        assert all(torch.equal(a, b) for a, b in zip(maps, features(x)[-3:]))


@FAMILIES
def test_weights_of_another_resolution(tmp_path, name):
    """Resizing the biases of a map once, in a file, and at every run comes to the same."""
    source = small(name).eval()
    target = load_file(tmp_path, source.state_dict(), name, **options(name, img_size=96))
    x = torch.randn(1, 3, 96, 96)
    assert target(x).shape == (1, 7)
    if name == "agent_deit_t":
        torch.testing.assert_close(target(x), source(x), rtol=1e-12, atol=1e-12)
    elif name != "agent_pvt_t":  # whose positions the file has bicubically, a run bilinearly
        a, b = (model.forward_intermediates(x, [0], intermediates_only=True)[0] for model in (source, target))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@FAMILIES
def test_sides_of_an_image_may_differ(tmp_path, name):
    oblong = small(name, img_size=(64, 128)).eval()
    square = load_file(tmp_path, oblong.state_dict(), name, **options(name))
    x = torch.randn(1, 3, 64, 128)
    assert oblong(x).shape == square(x).shape == (1, 7)
    if name in ("agent_deit_t", "agent_pvt_t"):
        pos, got, side = (
            ("pos_embed", "pos_embed", 4) if name == "agent_deit_t" else ("stages.0.pos_embed",) * 2 + (16,)
        )
        pos, got = oblong.state_dict()[pos], square.state_dict()[got]
        tokens = pos.shape[1] % side
        grid = pos[:, tokens:].transpose(1, 2).unflatten(2, (side, 2 * side))
        expected = F.interpolate(grid, (side, side), mode="bicubic").flatten(2).transpose(1, 2)
        assert torch.equal(got[:, tokens:], expected) and torch.equal(got[:, :tokens], pos[:, :tokens])


def test_containers(tmp_path):
    """A trainer's file holds the weights under 'model' and, CSwin's published one, an average beside; a detector's has
    them behind 'backbone.', without the head and with norms behind the stages."""
    swin = timm.create_model("agent_swin_t", **options("agent_swin_t"))
    weights = {k: v for k, v in swin.state_dict().items() if not k.startswith(("head.", "norm."))}
    weights |= {
        f"norm{i}.{kind}": torch.full((dim,), 0.5)
        for i, dim in enumerate((16, 32, 32, 64))
        for kind in ("weight", "bias")
    }
    detector = {f"module.backbone.{k}": v for k, v in weights.items()} | {"module.neck.weight": torch.zeros(3)}
    model = load_file(tmp_path, {"state_dict": detector}, "agent_swin_t", **options("agent_swin_t", out_norms=True))
    assert (model.out_norms[2].weight == 0.5).all() and model.head.fc.weight.std() > 0.01
    assert torch.equal(model.stages[3].blocks[1].mlp.fc1.weight, swin.stages[3].blocks[1].mlp.fc1.weight)
    plain = load_file(tmp_path, {"state_dict": detector}, "agent_swin_t", **options("agent_swin_t"))
    assert plain.out_norms is None and (plain.norm.weight == 1).all()
    average = {k: v + 1 for k, v in swin.state_dict().items()}
    content = {"state_dict": swin.state_dict(), "state_dict_ema": average, "epoch": 3}
    model = load_file(tmp_path, content, "agent_swin_t", **options("agent_swin_t"))
    assert torch.equal(model.stem.proj.weight, average["stem.proj.weight"])


def test_stripes_end_where_the_map_does():
    """A map that stripes do not divide equals one that was padded with zeros by hand; LePE does not cross stripes."""
    attn, x = StripeAttention(16, 4, (4, 3)), torch.randn(2, 7, 10, 16)
    padded = F.pad(x, (0, 0, 0, 2, 0, 2))
    whole = attn(padded.flatten(1, 2), (9, 12)).unflatten(1, (9, 12))[:, :7, :10]
    torch.testing.assert_close(attn(x.flatten(1, 2), (7, 10)).unflatten(1, (7, 10)), whole, rtol=1e-12, atol=1e-12)
    nn.init.eye_(attn.proj.weight)
    far = padded.clone()
    far[:, :, 4:] += 1.0  # beyond the first vertical stripe, and in every horizontal one
    a, b = (attn(y.flatten(1, 2), (9, 12)).unflatten(1, (9, 12)) for y in (padded, far))
    assert torch.equal(a[:, :, :4, :8], b[:, :, :4, :8]) and not torch.equal(a[:, :, :4, 8:], b[:, :, :4, 8:])


@pytest.mark.parametrize(("always", "shift"), [(False, 0), (True, 1)])
def test_windows_that_cover_the_map_shift_only_in_dense_form(always, shift):
    """Where one window covers the map, a shift would part it."""
    attn, x = WindowAttention(8, 2, (3, 3), shift=True, always_shift=always), torch.randn(1, 9, 8)
    far = x.clone()
    far[:, 0] += 1.0
    a, b = attn(x, (3, 3)), attn(far, (3, 3))
    assert torch.equal(a[:, 8], b[:, 8]) == bool(shift)


def test_heads_of_deit():
    x = torch.randn(2, 3, 64, 64)
    model = small("agent_deit_t").eval()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 32)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(3, "avg")
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1)) and model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
