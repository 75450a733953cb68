"""Attention maps: the recorded weights times the values are what each mixer computes, in every family."""

import copy

import pytest
import torch
from saccade.backbones import attention_maps, insert
from saccade.backbones.agent import AgentAttention, StripeAttention
from saccade.backbones.attention_maps import ChannelMap, GateMap, QueryMap, SamplingMap, has_description
from saccade.backbones.dfa3d import EncoderLayer
from saccade.backbones.ela import ELA
from saccade.backbones.patnet import FusedBlock, GatedMixer, SpatialAttention, nchw
from saccade.backbones.sparsifiner import SparseAttention
from saccade.backbones.ulsam import ULSAM
from support.families import SMALL, build, images
from torch import nn

pytestmark = pytest.mark.usefixtures("double")
SIZES = dict(biformer_t=(72, 88), biformer_stl_nchw=(72, 88), davit_t=(72, 88), dinat_m=(52, 72), halo_h0=(72, 88))
SIZES |= dict(agent_swin_t=(64, 88), agent_cswin_t=(80, 64), agent_pvt_t=(80, 64), agent_deit_t=(48, 80))


def prepared(name: str, **kwargs) -> tuple[nn.Module, tuple]:
    """A small model in float64 whose tables, biases and statistics are not their initial ones, and its inputs."""
    model = build(name, **kwargs).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 or "qkv" in key or "bias" in key or "attn" in key or "sampling" in key:
                p.add_(0.3 * torch.randn_like(p))
    return model, tuple(x.double() for x in images(name, 2, SIZES.get(name, (64, 64))))


def bare(mixer: nn.Module) -> nn.Module:
    """A copy of a mixer without its output projection and its convolution of the values."""
    mixer = copy.deepcopy(mixer)
    for name in ("proj", "output_proj"):
        if hasattr(mixer, name):
            setattr(mixer, name, nn.Identity())
    for name in ("lepe", "dwc", "dwc_rows"):
        if getattr(mixer, name, None) is not None:
            for p in getattr(mixer, name).parameters():
                nn.init.zeros_(p)
    return mixer


def mixed(record: QueryMap) -> torch.Tensor:
    """The recorded weights times the values, (B, queries, heads · D)."""
    weights = record.weights(torch.arange(record.num_queries))
    if record.normalized:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    return (weights @ record.values).transpose(1, 2).flatten(2)


@torch.no_grad()
def check(mixer: nn.Module, inputs: tuple, records: dict) -> None:
    """Check the records of a mixer, by kind, against what it computes."""
    if isinstance(mixer, EncoderLayer):
        query, position, frames, shape, where, *cameras = inputs
        time = bare(mixer.tsa)(query, position, frames, shape, where) - query
        query = mixer.norm1(mixer.tsa(query, position, frames, shape, where))
        torch.testing.assert_close(mixed(records["time"]), time)
        torch.testing.assert_close(mixed(records["cameras"]), bare(mixer.sca)(query, *cameras) - query)
        return
    if isinstance(mixer, FusedBlock):
        return  # compared with the block before fusion
    out = bare(mixer)(*inputs)
    if isinstance(mixer, StripeAttention):
        torch.testing.assert_close(torch.cat([mixed(records["vertical"]), mixed(records["horizontal"])], 2), out)
    elif isinstance(mixer, SparseAttention):
        out, left = out
        found = mixed(records["tokens"])
        kept = torch.arange(mixer.tokens).expand(2, -1) if inputs[1] is None else inputs[1]
        kept = kept if left is None else kept.gather(1, left)
        torch.testing.assert_close(found.gather(1, kept[..., None].expand(-1, -1, found.shape[2])), out)
        mask, weights = (records[kind].weights(torch.arange(mixer.tokens)) for kind in ("kept", "tokens"))
        assert torch.equal(weights > 0, mask > 0) and 0.1 < mask.mean() < 0.99
    elif isinstance(mixer, GatedMixer | SpatialAttention | ELA | ULSAM):
        (record,), x = records.values(), inputs[0]
        gate = record.gate
        if isinstance(mixer, GatedMixer):
            y = torch.cat((mixer.conv(nchw(x)[:, : mixer.part]), mixer.norm(nchw(x)[:, mixer.part :] * gate)), 1)
            torch.testing.assert_close(y.permute(0, 2, 3, 1), out)
            torch.testing.assert_close(record.map(head=1), gate[0, 1].expand(record.grid).float())
        elif isinstance(mixer, SpatialAttention):
            y = mixer.norm(nchw(x[..., : mixer.part]) * gate).permute(0, 2, 3, 1)
            torch.testing.assert_close(y, out[..., : mixer.part])
        elif isinstance(mixer, ELA):
            torch.testing.assert_close(x * gate + (x if mixer.residual else 0), out)
        else:
            torch.testing.assert_close(gate.sum((2, 3)), torch.ones(gate.shape[:2]))
            torch.testing.assert_close(x * (1 + gate.repeat_interleave(x.shape[1] // gate.shape[1], 1)), out)
    elif isinstance(record := next(iter(records.values())), ChannelMap):
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:3]))
        y = (record.values @ record.weights.mT).transpose(1, 2).flatten(2)
        torch.testing.assert_close(y, out.flatten(1, 2))
        norms = y.unflatten(2, (record.heads, -1)).square().mean(3).sqrt()[1, :, 0]
        torch.testing.assert_close(record.map(head=0, image=1), norms.unflatten(0, record.grid).float())
    else:
        record = records.get("tokens", record)
        out = out.flatten(2).mT if record.kind == "halo" else out
        torch.testing.assert_close(mixed(record), out.reshape(mixed(record).shape))
        if isinstance(mixer, AgentAttention):
            gather, give = records["gather"], records["give"]
            agents = torch.arange(gather.num_queries)
            product = give.weights(agents).mT @ gather.weights(agents)
            torch.testing.assert_close(product, record.weights(torch.arange(record.num_queries)))
        if "regions" in records:
            index = torch.arange(record.num_queries)
            assert torch.equal(
                records["regions"].weights(index).expand(-1, record.heads, -1, -1) > 0, record.weights(index) > 0
            )


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_those_of_the_layers(name):
    model, inputs = prepared(name)
    given = {}
    for key, module in model.named_modules():
        if has_description(module):
            module.register_forward_pre_hook(lambda module, args, key=key: given.__setitem__(key, args))
    records = model.attention_maps(*inputs)
    assert list(dict.fromkeys(record.layer for record in records)) == list(given) and given
    assert len({record.name for record in records}) == len(records)
    modules = dict(model.named_modules())
    for layer, args in given.items():
        check(modules[layer], args, {record.kind: record for record in records if record.layer == layer})
    for record in records:
        query = None if record.query_grid is None else (record.query_grid[0] - 1, 0)
        drawn = record.map(query, 0, 1)
        assert drawn.shape == record.grid and drawn.dtype == torch.float32 and drawn.isfinite().all()
        assert (drawn >= 0).all()
        mean = torch.stack([record.map(query, head, 1) for head in range(record.heads)]).mean(0)
        if not (isinstance(record, GateMap) and record.magnitude is not None) and not isinstance(record, SamplingMap):
            torch.testing.assert_close(record.map(query, None, 1), mean)


def test_strided_attention_with_a_mean():
    """Blocks of 7 that strides of 2 do not divide: the layer is the mean of 2 x 2 answers."""
    from saccade.backbones.halonet import HaloAttention

    torch.manual_seed(0)
    for block, scale_pos in ((7, False), (4, True)):
        mixer, x = HaloAttention(8, 12, 2, 4, block, 2, 2, scale_pos), torch.randn(2, 8, 15, 18)
        (record,) = attention_maps(mixer, x)
        out = mixed(record).mT.unflatten(2, record.query_grid)
        if block == 7:
            out = nn.functional.avg_pool2d(out, 2, ceil_mode=True)
        torch.testing.assert_close(out, mixer(x))
        assert 0 < record.map((0, 0)).sum() < 0.99  # cells outside the image take part


def test_fused_block_gates_as_before():
    model, inputs = prepared("patnet_t1")
    before = {r.name: r for r in model.attention_maps(*inputs)}
    after = {r.name: r for r in model.fuse().attention_maps(*inputs)}
    assert {n.replace("spatial:", ":").replace(".:", ":") for n in before} == set(after)
    for name, record in before.items():
        other = after[name.replace(".spatial:", ":")]
        torch.testing.assert_close(record.map(record.query_grid and (0, 1)), other.map(other.query_grid and (0, 1)))


def test_maps_are_on_the_grid():
    """Rows are y, columns x, and padding is cut."""
    model, (x,) = prepared("biformer_t")  # 72 x 88: 18 x 22 cells, padded to 21 x 28
    records = {record.name: record for record in model.attention_maps(x)}
    regions = records["stages.0.blocks.0.attn:regions"].map((17, 21))
    assert regions.shape == (18, 22)
    _, _, idx, _, (h, w) = (
        model.stages[0]
        .blocks[0]
        .attn._project(
            model.stages[0].blocks[0].norm1(_position(model.stages[0].blocks[0], model.stem(x).permute(0, 2, 3, 1)))
        )
    )
    chosen = {divmod(int(r), 7) for r in idx[0, 17 // h * 7 + 21 // w]}
    expected = torch.zeros(18, 22)
    for i, j in chosen:
        expected[i * h : (i + 1) * h, j * w : (j + 1) * w] = 1
    assert torch.equal(regions, expected)
    neighbors = {r.name: r for r in build("dinat_m", kernel_size=3).attention_maps(torch.randn(1, 3, 64, 64))}
    local, dilated = (neighbors[f"stages.1.blocks.{i}.attn:neighborhood"].map((3, 4)) for i in (0, 1))
    assert local.nonzero().tolist() == [[y, x] for y in (2, 3, 4) for x in (3, 4, 5)]
    assert dilated.nonzero().tolist() == [[y, x] for y in (1, 3, 5) for x in (2, 4, 6)]
    assert records["stages.0.blocks.0.attn:tokens"].query_at(71.9, 40, (72, 88)) == (17, 10)


def _position(block, x):
    return x + block.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_samples_of_the_cameras():
    model, inputs = prepared("dfa3d_bev_s")
    record = next(r for r in model.attention_maps(*inputs) if r.kind == "cameras")
    assert record.query_grid == (6, 5) and record.sources == 2 and record.grid == (4, 4)
    seen = 0
    for cell in ((0, 0), (2, 2), (5, 3)):
        samples, total = record.samples(cell), record.weights(torch.tensor([5 * cell[0] + cell[1]]))[0]
        seen += len(set(samples["source"].tolist()))
        assert samples["x"].shape == samples["weight"].shape and (samples["weight"] >= 0).all()
        if len(samples["x"]):
            per_camera = samples["weight"].view(-1, 4, 2, 4).sum((2, 3))  # of each head, over levels and points
            torch.testing.assert_close(per_camera, torch.ones_like(per_camera))
        for source in range(2):
            maps = [record.map(cell, source=source, level=level).sum() for level in (0, 1)]
            torch.testing.assert_close(sum(maps), total.mean(0)[0].view(2, -1)[source].sum().float())
            assert (sum(maps) > 0) == (source in samples["source"].tolist())
    assert seen > 0


def test_inserted_layers_and_modes():
    net = insert(build("ela_resnet18"), "ulsam", "layer1").train()
    before = copy.deepcopy(net.state_dict())
    records = attention_maps(net, torch.randn(2, 3, 64, 64))
    assert records[2].name == "layer1.inserted.ulsam:subspaces" and net.training and net.layer1.inserted.ulsam.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert attention_maps(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)) == []


def test_refuses_what_is_not_there():
    model, (x,) = prepared("davit_t")
    window, channels, *_ = model.attention_maps(x)
    with pytest.raises(ValueError, match=r"query must be a cell \(row, column\) of 18 x 22 in .*window, got \(18, 0\)"):
        window.map((18, 0))
    with pytest.raises(ValueError, match=r"query must be a cell .* got None"):
        window.map()
    with pytest.raises(ValueError, match=r"head must be from 0 to 0 in stages.0.blocks.0.1.attn:channels, got 3"):
        channels.map(head=3)
    with pytest.raises(ValueError, match="image must be from 0 to 1, got 2"):
        channels.map(image=2)
    with pytest.raises(ValueError, match="query must lie in the image of 88 x 72 pixels, got x=88, y=0"):
        window.query_at(0, 88, (72, 88))
