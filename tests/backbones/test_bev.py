"""DFA3D's lifter equals the published modules, and its geometry is right by construction."""

import math

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.backbones.dfa3d import (
    ENCODER_KEYS,
    BEVLifter,
    DeformableAttention,
    Encoder,
    SpatialCrossAttention,
    TemporalSelfAttention,
    align,
    make_pillars,
    project,
    rename,
)
from saccade.backbones.dfa3d_depth import DeformConv, DepthHead, depth_bins, depth_target
from saccade.backbones.published import rename_key
from saccade.ops import dfa3d
from saccade.train.models.bev import depth_loss
from support import parity
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

pytestmark = pytest.mark.usefixtures("double")  # as default type


def build(spec: dict) -> Tensor:
    """An input of a fixture: seeded values, then its transforms in order."""
    t = parity.seeded(spec["seed"], spec["shape"])
    for name, *args in spec.get("transform", []):
        if name == "affine":
            t = args[0] + args[1] * t
        elif name == "softmax":
            t = t.softmax(args[0])
        elif name == "abs":
            t = t.abs()
        else:
            assert name == "keep_above"
            t = torch.where(parity.seeded(args[0], t.shape) > args[1], t, 0.0)
    return t


def inputs(fixture: dict) -> dict[str, Tensor]:
    return {name: build(spec).requires_grad_() for name, spec in fixture["inputs"].items()}


def filled(module: nn.Module, fixture: dict, rename=lambda key: key) -> nn.Module:
    weights = {rename(key): value for key, value in parity.weights(fixture).items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return module.eval()


def assert_module(fixture, module, given, outputs, rename=lambda key: key) -> None:
    """Outputs, the gradients of the first to the parameters, and those to the inputs."""
    for name, got in outputs.items():
        parity.assert_equal(name, got, fixture["outputs"][name])
    first = next(iter(outputs.values()))
    (first * parity.seeded(1, first.shape)).sum().backward()
    parity.assert_gradients(module, fixture["grads"], rename)
    for name, want in fixture["input_grads"].items():
        if want is not None:
            parity.assert_equal(f"gradient of {name}", given[name].grad, want)


def geometry(c: dict) -> tuple[Tensor, Tensor]:
    """(reference (1, N, Q, Z, 3), seen) of a fixture's cameras."""
    points = make_pillars(tuple(c["bev"]), c["pc_range"], c["num_points_in_pillar"], torch.empty(0))
    return project(points, torch.tensor(c["lidar2img"])[None], tuple(c["img_shape"]), tuple(c["d_bound"]))


def levels(c: dict) -> list[tuple[int, int]]:
    return [tuple(level) for level in c["levels"]]


def test_equals_published_attention():
    fixture = parity.load("dfa3d", "mod_deform_attn")
    c, given = fixture["constants"], inputs(fixture)
    module = filled(DeformableAttention(32, c["num_heads"], 2, c["num_points"], depth=True), fixture)
    query, value, depth, reference = given.values()
    out = module(query, value, depth, levels(c), reference)
    arguments = module.sample(query, value, depth, levels(c), reference)
    score = dfa3d(*arguments, return_depth_score=True)[1]
    update = (score.mean(-1) * arguments[-1]).sum((-2, -1))[..., None]
    assert_module(fixture, module, given, dict(output=out, weight_update=update))


def test_equals_published_attention_over_cameras():
    fixture = parity.load("dfa3d", "mod_spatial_cross_attn")
    c, given = fixture["constants"], inputs(fixture)
    reference, seen = geometry(c)
    cameras_first = reference.transpose(0, 1)
    visible = torch.where(seen.transpose(0, 1)[..., None], cameras_first, 0.0)
    parity.assert_equal("visible", visible, fixture["outputs"]["reference_points_cam_visible"])
    parity.assert_equal("depth", cameras_first[..., 2], fixture["outputs"]["reference_depth"])
    parity.assert_equal("mask", seen.transpose(0, 1), fixture["outputs"]["bev_mask"])
    module = filled(SpatialCrossAttention(32, c["num_heads"], 2, c["num_points"], True, 0.1), fixture)
    value, depth = (given[name].permute(2, 0, 1, 3) for name in ("value", "value_dpt_dist"))
    out = module(given["query"], value, depth, levels(c), reference, seen)
    assert_module(fixture, module, given, dict(output=out, output_minus_query=out - given["query"]))


@pytest.mark.parametrize("fixture", ["mod_temporal_self_attn", "mod_temporal_self_attn_first"])
def test_equals_published_attention_over_time(fixture):
    fixture = parity.load("dfa3d", fixture)
    c, given = fixture["constants"], inputs(fixture)
    module = filled(TemporalSelfAttention(32, c["num_heads"], c["num_points"], 0.1), fixture)
    cells = make_pillars(tuple(c["bev"]), [0, 0, 0, 1, 1, 1], 1, torch.empty(0))[None, :, 0, :2]
    frames = (given["prev_bev"], given["query"]) if "prev_bev" in given else None
    out = module(given["query"], given["bev_pos"], frames, tuple(c["bev"]), cells + torch.tensor(c["shift"]))
    assert_module(fixture, module, given, dict(output=out))


def encoder(fixture: dict) -> Encoder:
    c = fixture["constants"]
    layer = dict(dim=32, heads=c["num_heads"], levels=2, points=c["sca_points"], tsa_points=c["tsa_points"])
    return Encoder(c["layers"], **layer, hidden=c["ffn"], depth=True, drop=0.1)


def encoder_key(key: str) -> str:
    return rename_key(key, ENCODER_KEYS)


def test_equals_published_encoder():
    fixture = parity.load("dfa3d", "mod_bev_encoder")
    c, given = fixture["constants"], inputs(fixture)
    module = filled(encoder(fixture), fixture, encoder_key)
    query, position, before = (given[name].transpose(0, 1) for name in ("bev_query", "bev_pos", "prev_bev"))
    value, depth = (given[name].permute(2, 0, 1, 3) for name in ("value", "value_dpt_dist"))
    shift = torch.tensor(c["shift"])[None]
    out = module(query, position, before, shift, tuple(c["bev"]), value, depth, levels(c), *geometry(c))
    assert_module(fixture, module, given, dict(bev_embed=out), encoder_key)


@pytest.mark.parametrize(("fixture", "groups"), [("mod_depth_head_plain", ()), ("mod_depth_head_mlv", (2, 4, 8))])
def test_equals_published_depth_network(fixture, groups):
    fixture = parity.load("dfa3d", fixture)
    c, given = fixture["constants"], inputs(fixture)
    bound = tuple(c["dbound"])
    head = filled(DepthHead(c["in_channels"], c["mid_channels"], depth_bins(bound), groups), fixture)
    codes = head(given["feat1"][0])
    bins = {f"dpt_scale{i}": F.interpolate(head.decode(codes), tuple(s)) for i, s in enumerate(c["scales"])}
    target = depth_target(build(c["gt_depth"])[0], c["downsample_factor"], bound, c.get("max_tol", 0))
    target = head.encode(target)
    rows = target.permute(0, 2, 3, 1).flatten(0, 2)
    loss = 0.5 * depth_loss(codes[None], target[None]).detach().view(1)
    assert_module(fixture, head, given, dict(dpt_dist=codes, **bins, gt_target=rows, loss_dpt=loss))


def test_deformable_convolution_is_torchvisions():
    """With taps far beyond the border, on a map that is not square; gradients too."""
    torch.manual_seed(0)
    conv = DeformConv(8, groups=4)
    nn.init.normal_(conv.conv_offset.weight, std=0.5)
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    out, offset = conv(x), conv.conv_offset(x)
    assert offset.abs().max() > 4
    want = deform_conv2d(x, offset, conv.weight, padding=1)
    dout, inputs = torch.randn_like(out), [x, *conv.parameters()]
    ours, theirs = (torch.autograd.grad(y, inputs, dout, retain_graph=True) for y in (out, want))
    torch.testing.assert_close((out, *ours), (want, *theirs), rtol=1e-9, atol=1e-9)


def test_equals_published_depth_targets():
    fixture = parity.load("dfa3d", "fn_gt_depth")
    c = fixture["constants"]
    depth = build(fixture["inputs"]["gt_depth"])[:, 0]
    target = depth_target(depth, c["downsample_factor"], tuple(c["dbound"]), c["max_tol"])
    parity.assert_equal("dpt_dist", target, fixture["outputs"]["dpt_dist"])
    for i, size in enumerate(c["scales"]):
        name = f"dpt_scale{i}"
        parity.assert_equal(name, F.interpolate(target, tuple(size)), fixture["outputs"][name])


TINY = dict(backbone="test_resnet", strides=(8, 16), depth_stride=8, embed_dims=32, heads=4, layers=2, ffn=64)
TINY |= dict(bev_size=(6, 5), pc_range=(-10.0, -12.0, -2.0, 10.0, 12.0, 2.0), depth_bound=(1.0, 15.0, 1.0), can_bus=4)


def tiny(**kwargs) -> BEVLifter:
    torch.manual_seed(0)
    model = timm.create_model("dfa3d_bev_s", **(TINY | kwargs)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.encoder.parameters():  # away from where attention starts, which is the same for all queries
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def camera(yaw: float, focal: float = 40.0, size=(48, 80), at=(0.0, 0.0, 0.0)) -> Tensor:
    """lidar2img of a pinhole camera that looks along yaw degrees from the x axis: (4, 4)."""
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    extrinsic = torch.eye(4)
    extrinsic[:3, :3] = torch.tensor([[s, -c, 0.0], [0.0, 0.0, -1.0], [c, s, 0.0]])  # right, down, ahead
    extrinsic[:3, 3] = -extrinsic[:3, :3] @ torch.tensor(at)
    intrinsic = torch.eye(4)
    intrinsic[:2, :3] = torch.tensor([[focal, 0.0, size[1] / 2], [0.0, focal, size[0] / 2]])
    return intrinsic @ extrinsic


def seen(batch: int = 2, cams: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(2)
    matrices = torch.stack([camera(360 / cams * i) for i in range(cams)])
    return dict(images=torch.randn(batch, cams, 3, 48, 80), lidar2img=matrices.repeat(batch, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "encoder", "sca"), [("dfa3d_bev_s", 2_075_712, 197_376), ("dfa3d_bev_b", 5_335_680, 394_752)]
)
def test_published_parameter_counts(name, encoder, sca):
    with torch.device("meta"):
        model = timm.create_model(name, backbone="resnet18", can_bus=18)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.encoder) == encoder and count(model.encoder.layers[0].sca) == sca
    assert count(model.encoder.layers[0].tsa) == 230_080 and count(model.encoder.layers[0].mlp) == 262_912
    assert count(model.depth) == 6_559_018


def test_takes_published_weights(tmp_path):
    """The encoder and the depth network of a detector's file; its other entries are the model's own."""
    model, other = tiny(), tiny()
    for p in other.parameters():
        p.data.normal_()
    ours = {r".tsa.": ".attentions.0.", r".sca.": ".attentions.1.", ".mlp.fc1.": ".ffns.0.layers.0.0."}
    ours |= {".mlp.fc2.": ".ffns.0.layers.1.", ".norm1.": ".norms.0.", ".norm2.": ".norms.1.", ".norm3.": ".norms.2."}
    published = {"pts_bbox_head.cls_branches.0.0.weight": torch.ones(3), "img_backbone.conv1.weight": torch.ones(3)}
    for key, value in other.state_dict().items():
        if key.startswith("depth."):
            published[key.replace("depth.", "pts_dpt_head.", 1)] = value
        elif key.startswith("encoder."):
            for mine, theirs in ours.items():
                key = key.replace(mine, theirs)
            published[f"pts_bbox_head.transformer.{key}"] = value
    assert "pts_bbox_head.transformer.encoder.layers.1.ffns.0.layers.0.0.weight" in published
    file = tmp_path / "published.pth"
    torch.save(dict(state_dict=published), file)
    loaded = timm.create_model("dfa3d_bev_s", **TINY, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    want = {rename(key): value for key, value in published.items() if key.startswith("pts_")}
    for key, value in loaded.state_dict().items():
        if key.startswith(("encoder.", "depth.")):
            assert torch.equal(value, want[key]), key
    del published["pts_bbox_head.transformer.encoder.layers.0.norms.0.weight"]
    torch.save(dict(state_dict=published), file)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.norm1\.weight is missing there and \(32,\) here"):
        timm.create_model("dfa3d_bev_s", **TINY, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    torch.save(model.state_dict(), file)
    own = timm.create_model("dfa3d_bev_s", **TINY, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    given = seen()
    assert torch.equal(own(**given), model(**given))


def test_samples_of_a_batch_are_their_own():
    """Other cameras, other depths, another past: each sample is what it is alone."""
    model, given = tiny(), seen()
    given["lidar2img"] = torch.stack([given["lidar2img"][0], torch.stack([camera(50), camera(60), camera(200)])])
    given |= dict(prev_bev=torch.randn(2, 32, 6, 5), motion=torch.tensor([[1.0, 3, 20], [0, -2, -70]]))
    given |= dict(can_bus=torch.randn(2, 4), cameras=torch.tensor([[True, True, True], [True, False, True]]))
    whole = model(**given)
    for i in range(2):
        alone = model(**{name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-9, atol=1e-12)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_gathering_changes_nothing():
    """Every query looking through every camera gives the same, where those that see nothing are left out of the sum."""
    torch.manual_seed(0)
    module = SpatialCrossAttention(32, 4, 2, 8, True, 0.0).eval()
    c = parity.load("dfa3d", "mod_spatial_cross_attn")["constants"]
    reference, visible = (t.repeat(2, *([1] * (t.dim() - 1))) for t in geometry(c))
    visible[1, 0] &= torch.rand(visible[1, 0].shape) < 0.5
    query, value = torch.randn(2, 30, 32), torch.randn(2, 3, 75, 32)
    depth = torch.randn(2, 3, 75, 16).softmax(-1)
    want = torch.zeros_like(query)
    for b in range(2):
        for n in range(3):
            one = module.deformable_attention(
                query[b, None], value[b, n, None], depth[b, n, None], levels(c), reference[b, n, None]
            )
            want[b] += one[0] * visible[b, n].any(-1)[:, None]
    here = visible.any(-1).sum(1).clamp(min=1)[..., None]
    got = module(query, value, depth, levels(c), reference, visible)
    torch.testing.assert_close(got, module.output_proj(want / here) + query, rtol=1e-12, atol=1e-12)


def test_missing_cameras_are_as_if_not_there():
    model, given = tiny(cams=0, can_bus=0), seen()
    there = torch.tensor([True, True, False]).expand(2, 3)
    fewer = model(given["images"][:, :2], given["lidar2img"][:, :2])
    torch.testing.assert_close(model(**given, cameras=there), fewer, rtol=1e-12, atol=1e-12)
    assert (model(**given) - fewer).abs().max() > 1e-3
    nobody = model(**given, cameras=torch.zeros(2, 3, dtype=torch.bool))
    assert nobody.isfinite().all() and torch.equal(nobody[0], nobody[1])


def lifted(matrices: Tensor, lit: list[tuple[int, int, int]], bins: list[int], side: int = 16) -> Tensor:
    """What a view of 32x32 m gets of maps (1, N, 1, *shape) that are 1 in the lit cells (camera, row, column)
    and 0 elsewhere, each at one depth bin of half a metre from 2 m on: (side, side)."""
    shape, D = (12, 20), 28
    N, cells = len(matrices), shape[0] * shape[1]
    module = SpatialCrossAttention(1, 1, 1, 1, True, 0.0)
    for p in module.parameters():
        p.data.zero_()
    for layer in (module.deformable_attention.value_proj, module.output_proj):
        layer.weight.data.fill_(1.0)
    value, depth = torch.zeros(1, N, cells, 1), torch.zeros(1, N, cells, D)
    for (n, row, column), bin in zip(lit, bins):
        value[0, n, row * shape[1] + column] = 1
        depth[0, n, row * shape[1] + column, bin] = 1
    points = make_pillars((side, side), (-16, -16, -0.5, 16, 16, 0.5), 1, torch.empty(0))
    reference, visible = project(points, matrices[None], (48, 80), (2.0, 16.0, 0.5))
    return module(torch.zeros(1, side**2, 1), value, depth, [shape], reference, visible).view(side, side).detach()


def cell(x: float, y: float) -> tuple[int, int]:
    return int((y + 16) // 2), int((x + 16) // 2)


def lit_by(matrix: Tensor, x: float, y: float, n: int = 0) -> tuple[tuple[int, int, int], int]:
    """The cell of a camera's map, and the bin, in which a point on the plane z = 0 lies."""
    u, v, d = (matrix @ torch.tensor([x, y, 0.0, 1.0]))[:3].tolist()
    return (n, int(v / d / 4), int(u / d / 4)), int((d - 2) / 0.5)


def test_two_cameras_lift_a_point_to_one_cell():
    matrices = torch.stack([camera(0), camera(70, at=(1.0, -2.0, 0.0))])
    point = (9.0, 5.0)
    peaks = []
    for n in range(2):
        where, bin = lit_by(matrices[n], *point)
        view = lifted(matrices[n : n + 1], [where], [bin])
        peaks.append(divmod(int(view.argmax()), 16))
        assert view.max() > 0
    assert peaks[0] == peaks[1] == cell(*point)


def test_turning_the_ego_turns_the_view():
    """By 90°, of the lifted view and of the view of before."""
    points = torch.tensor([[7.0, 3.0], [11.0, -5.0], [13.0, 1.0]])
    here, bins = zip(*[lit_by(camera(0), *point) for point in points.tolist()])
    ahead, left = (lifted(camera(yaw)[None], list(here), list(bins)) for yaw in (0, 90))
    assert (ahead > 0).sum() >= 3
    torch.testing.assert_close(left, ahead.rot90(-1), rtol=1e-9, atol=1e-12)  # y grows downwards in the array
    view = torch.randn(2, 4, 8, 8)
    turned = align(view, torch.tensor([90.0, -90.0]))
    assert torch.equal(turned[0], view[0].rot90(1, (1, 2))) and torch.equal(turned[1], view[1].rot90(-1, (1, 2)))
    # An ego that has turned left sees what was ahead (y > 0) on its right (x > 0).
    ahead = torch.zeros(1, 1, 8, 8)
    ahead[0, 0, 6, 3:5] = 1
    assert align(ahead, torch.tensor([90.0]))[0, 0, 3:5, 6].tolist() == [1, 1]


def test_previous_view_is_where_it_was():
    """Moved ahead by two cells, a cell looks two cells further on in the view of before, which then lies on the same
    place of the world."""
    torch.manual_seed(0)
    H, W = 10, 8
    module = TemporalSelfAttention(4, 1, 1, 0.0)
    for p in module.parameters():
        p.data.zero_()
    for layer in (module.value_proj, module.output_proj):
        layer.weight.data.copy_(torch.eye(4))
    before, present = torch.randn(1, H * W, 4), torch.zeros(1, H * W, 4)
    cells = make_pillars((H, W), (0, 0, 0, 1, 1, 1), 1, torch.empty(0))[None, :, 0, :2]
    where = cells + torch.tensor([0.0, 2 / H])
    out = 2 * module(torch.zeros(1, H * W, 4), torch.zeros(H * W, 4), (before, present), (H, W), where)
    out, before = out.view(H, W, 4), before.view(H, W, 4)
    torch.testing.assert_close(out[:-2], before[2:], rtol=1e-9, atol=1e-12)
    assert not out[-2:].any()


def test_shift_is_the_published_one():
    """Ours is translation over span in the view's axes; published are global translation and yaw, y being ahead."""
    yaw, dx, dy = 30.0, 3.0, 1.0
    angle = math.radians(yaw) - math.atan2(dy, dx)
    published = math.hypot(dx, dy) * math.sin(angle) / 102.4, math.hypot(dx, dy) * math.cos(angle) / 102.4
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    ahead, right = (c, s), (s, -c)
    ours = (dx * right[0] + dy * right[1]) / 102.4, (dx * ahead[0] + dy * ahead[1]) / 102.4
    assert ours == pytest.approx(published)


def test_another_depth_bin_moves_the_response():
    where, bin = lit_by(camera(0), 9.0, 1.0)
    centres = []
    for further in range(9):
        view = lifted(camera(0)[None], [where], [bin + further], side=64)
        x = (torch.arange(64) - 31.5) / 2
        centres.append(float((view.sum(0) * x).sum() / view.sum()))
    torch.testing.assert_close(torch.tensor(centres).diff(), torch.full((8,), 0.5), rtol=0, atol=0.05)


def test_behind_a_camera_is_nothing():
    matrix = camera(0)[None]
    everywhere = [(0, row, column) for row in range(12) for column in range(20)]
    for bin in (0, 10, 27):
        view = lifted(matrix, everywhere, [bin] * len(everywhere), side=64)
        assert not view[:, :32].any() and view[:, 32:].any()  # x < 0, x > 0
    points = torch.tensor([[[-5.0, 0, 0]], [[5.0, 0, 0]]])
    reference, visible = project(points, matrix[None], (48, 80), (2.0, 16.0, 0.5))
    assert visible.flatten().tolist() == [False, True]
    assert reference[0, 0, 0, 0, 2].item() == pytest.approx(-7 / 14) and reference.isfinite().all()


def test_known_depth_takes_the_networks_place():
    model, given = tiny(), seen()
    depth = torch.rand(2, 3, 48, 80) * 14 + 1
    got, codes = model(**given, depth=depth, return_depth=True)
    maps, _ = model.maps(given["images"])
    bins = depth_target(depth.flatten(0, 1), 8, (1.0, 15.0, 1.0), 2).unflatten(0, (2, 3))
    assert torch.equal(got, model.lift(maps, bins, given["lidar2img"], (48, 80)))
    assert (got - model(**given)).abs().max() > 1e-4 and codes.shape == (2, 3, 3, 6, 10)
    assert torch.equal(model.depth_codes(depth).sum(2), torch.ones(2, 3, 6, 10))  # one bin a cell
    bare = tiny(depth_network=False)
    with pytest.raises(ValueError, match=r"depth must be given to a lifter .*depth_network=False, got None"):
        bare(**given)
    assert bare(**given, depth=depth).shape == (2, 32, 6, 5)


def test_depth_gain_multiplies_the_distribution():
    """A uniform distribution with a gain of as many as there are bins leaves the features as without depth."""
    model, given = tiny(depth_gain=14.0, layers=1), seen()
    maps, codes = model.maps(given["images"])
    bins = codes.new_full((2, 3, 14, 6, 10), 1 / 14)
    got = model.lift(maps, bins, given["lidar2img"], (48, 80))
    model.depth_gain = 1.0
    torch.testing.assert_close(got, model.lift(maps, 14 * bins, given["lidar2img"], (48, 80)))
    assert (got - model.lift(maps, bins, given["lidar2img"], (48, 80))).abs().max() > 1e-2


def test_the_start_of_cells_and_offsets():
    """Little noise: the cells begin alike. A scale of 0.25: all offsets over cameras begin a quarter as large."""
    torch.manual_seed(0)
    plain = timm.create_model("dfa3d_bev_s", **TINY)
    torch.manual_seed(0)
    model = timm.create_model("dfa3d_bev_s", **TINY, cell_noise=0.1, offset_scale=0.25)
    assert plain.query.detach().std(0).mean() == pytest.approx(1, abs=0.2)
    assert model.query.detach().std(0).mean() == pytest.approx(0.1, abs=0.02) and model.query.mean(0).std() > 0.5
    before, after = (m.encoder.layers[0].sca.deformable_attention for m in (plain, model))
    torch.testing.assert_close(after.sampling_offsets.bias, 0.25 * before.sampling_offsets.bias)
    torch.testing.assert_close(after.sampling_offsets_depth.bias, 0.25 * before.sampling_offsets_depth.bias)
    torch.testing.assert_close(after.sampling_offsets_depth.weight, 0.25 * before.sampling_offsets_depth.weight)
    assert torch.equal(after.value_proj.weight, before.value_proj.weight)


def test_without_depth_is_two_dimensional():
    """The third coordinate is ignored, and there is neither a network nor an offset for it."""
    model, given = tiny(lift_depth=False), seen()
    assert model.depth is None and not any("depth" in name for name, _ in model.named_parameters())
    view, codes = model(**given, return_depth=True)
    assert codes is None
    nearer = given["lidar2img"].clone()
    nearer[:, :, :3] *= 0.5  # the same pixels, half the depth
    torch.testing.assert_close(model(given["images"], nearer), view, rtol=1e-9, atol=1e-12)


def test_gradients_reach_every_parameter():
    model, given = tiny(), seen()
    model.train()
    view, codes = model(**given, prev_bev=torch.randn(2, 32, 6, 5), can_bus=torch.randn(2, 4), return_depth=True)
    (view.square().sum() + codes.square().sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.manual_seed(3)
    model.eval()
    model(**given).square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.encoder.train()  # checkpointing is for training; no dropout acts here
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model(**given).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-9)


def test_exported_for_any_cameras():
    """A graph made of one set of cameras is right for another, which sees other cells."""
    model, given = tiny(layers=1).eval(), seen()
    other = torch.export.export(model, (), given).module()
    matrices = torch.stack([camera(70.0 * i, focal=25.0) for i in range(3)]).repeat(2, 1, 1, 1)
    changed = dict(images=torch.randn_like(given["images"]), lidar2img=matrices)
    with torch.no_grad():
        want = model(**changed)
        assert (want - model(**given)).abs().max() > 0.01
        torch.testing.assert_close(other(**changed), want, rtol=1e-9, atol=1e-9)


def test_bfloat16_autocast_is_close():
    torch.set_default_dtype(torch.float32)
    model, given = tiny().float(), {name: value.float() for name, value in seen().items()}
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**given)
    assert (low - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(images=torch.zeros(2, 3, 48, 80)), r"images must be \(B, cameras, 3, H, W\), got \(2, 3, 48, 80\)"),
        (dict(images=torch.zeros(2, 7, 3, 48, 80)), "at most 6 cameras, which have an embedding each, got 7"),
        (dict(lidar2img=torch.zeros(2, 3, 3, 4)), r"lidar2img must be \(2, 3, 4, 4\), got \(2, 3, 3, 4\)"),
        (dict(prev_bev=torch.zeros(2, 32, 5, 6)), r"prev_bev must be \(2, 32, 6, 5\), got \(2, 32, 5, 6\)"),
        (dict(motion=torch.zeros(2, 2)), r"motion must be \(2, 3\), got \(2, 2\)"),
    ],
)
def test_wrong_inputs(given, said):
    with pytest.raises(ValueError, match=said):
        tiny()(**(seen() | given))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(num_classes=10), "dfa3d_bev_s has no classifier: num_classes must be 0, got 10"),
        (dict(strides=(8, 12)), r"strides must be some of test_resnet's \[\d+, .*got \(8, 12\)"),
        (dict(points=6), "points must be a multiple of pillar=4, got 6"),
        (dict(depth_stride=32), r"depth_stride must be one of strides=\(8, 16\), got 32"),
        (dict(depth_bound=(1.0, 15.0, 4.0)), "depth_bound must be .* whole steps"),
        (dict(depth_bound=(1.0, 16.0, 1.0)), "depth bins must be a multiple of the groups' 14, got 15"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        tiny(**arguments)


def test_layers_for_optimisers():
    """timm's layer decay takes the image backbone first, then maps and encoder, layer by layer, then the embeddings."""
    from timm.optim import param_groups_layer_decay

    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    scales, free = {}, set()
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5):
        for p in group["params"]:
            scales.setdefault(names[id(p)].split(".")[0], set()).add(group["lr_scale"])
            free |= {names[id(p)]} if group["weight_decay"] == 0 else set()
    assert scales["backbone"] == {0.125} and scales["fpn"] == scales["depth"] == {0.25}
    assert scales["encoder"] == {0.25, 0.5} and scales["query"] == scales["can_bus_mlp"] == {1.0}
    assert {"query", "row_embed", "column_embed", "level_embed", "camera_embed"} <= free
