"""Published detectors in a bird's-eye view: their files are read, and they compute what was recorded of them."""

import math
import re
import zlib

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.dfa3d import align
from saccade.backbones.resnet_dcn import MEAN, STD, ResNetDCN
from saccade.train.models import load_published
from saccade.train.models.bev import BevDetector, DecoderHead, from_published, inverse_sigmoid
from saccade.train.models.published import NUSCENES
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.lift import Lift
from support import parity
from torch import Tensor

SMALL = dict(backbone_args=dict(depths=(1, 1, 1, 1), width=4), embed_dims=16, heads=2, points=4, layers=1, ffn=32)
SMALL |= dict(bev_size=(6, 5), depth_bound=(2.0, 16.0, 1.0))
HEAD = dict(queries=7, layers=2, heads=2, hidden=32)
CONFIG = "nuscenes/dfa3d_bev_s"
MEAN_BGR = (103.530, 116.280, 123.675)


def published_state(fixture: dict, part: str = "") -> dict[str, Tensor]:
    """The recorded file's tensors whose names begin with `part`."""
    recorded = parity.load("bev", "state_small")
    rows = [[key, kind, fixture["shapes"].get(key, shape)] for key, kind, shape in recorded["state"]]
    rows = [row for row in rows if row[0].startswith(part)]
    tensors = parity.weights(dict(state=rows))
    for key, kind, _ in rows:
        if kind == "constant":
            tensors[key] = torch.tensor(recorded["constants"][key])
        if key.endswith("in_proj_weight"):  # filled as what is no "weight" was
            tensors[key] = 0.2 * parity.seeded(zlib.crc32(key.encode()), tensors[key].shape)
        for pattern, factor in recorded["scale"]:
            if kind != "constant" and key in tensors and re.search(pattern, key):
                tensors[key] = tensors[key] * factor
    return {key: value.float() for key, value in tensors.items()}


def to_bottom(boxes: Tensor) -> Tensor:
    """Our boxes as the published model gives them: z of the bottom, width before length, and its angle."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    angle = math.pi - torch.remainder(yaw + 1.5 * math.pi, 2 * math.pi)
    return torch.stack([x, y, z - height / 2, width, length, height, angle, vx, vy], -1)


def published_codes(codes: Tensor) -> Tensor:
    return torch.cat([codes[..., :6], -codes[..., 7:8], -codes[..., 6:7], codes[..., 8:]], -1)


def assert_outputs(head: DecoderHead, outputs: list, want: dict) -> None:
    for (logits, codes), classes, numbers in zip(outputs, want["classes"], want["codes"], strict=True):
        parity.assert_equal("classes", logits, classes)
        parity.assert_equal("codes", published_codes(codes), numbers)
    ((boxes, scores, labels),) = head.boxes(outputs)
    parity.assert_equal("boxes", to_bottom(boxes), want["boxes"])
    parity.assert_equal("scores", scores, want["scores"])
    parity.assert_equal("labels", labels, want["labels"])


def test_decoder_and_its_loss():
    """Every layer's outputs, boxes, losses and their gradients to the view."""
    fixture = parity.load("bev", "decoder")
    lifter = timm.create_model("dfa3d_bev_s", backbone_args=dict(depths=(1, 1, 1, 1), width=4), bev_size=(20, 20))
    net = BevDetector(lifter, DecoderHead(256, 10, (20, 20), lifter.pc_range, queries=60))
    tensors = from_published(published_state(fixture, "pts_bbox_head."), net)
    head = net.head.double().eval()
    head.load_state_dict({k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")})
    flat = parity.seeded(fixture["view"]["seed"], fixture["view"]["shape"]).requires_grad_()
    outputs = head(flat.mT.unflatten(2, (20, 20)))
    assert_outputs(head, outputs, fixture["outputs"])
    x, y, z, w, length, h, r, vx, vy = torch.tensor(fixture["targets"]["boxes"], dtype=torch.float64).unbind(-1)
    boxes = torch.stack([x, y, z, length, w, h, -r - math.pi / 2, vx, vy], -1)
    losses = head.loss(outputs, [boxes], [torch.tensor(fixture["targets"]["labels"])])
    for key, want in fixture["losses"].items():
        layer, _, kind = key.rpartition(".")
        name = dict(loss_cls="classes", loss_bbox="boxes")[kind] + layer.replace("d", "_")
        assert losses[name].item() == pytest.approx(want, rel=1e-7), key
    sum(losses.values()).backward()
    parity.assert_equal("gradient", flat.grad, fixture["loss_view_grad"], rtol=1e-7)


@pytest.mark.exhaustive
def test_whole_detector(tmp_path):
    """ResNet-101 with deformable convolutions to boxes, frame after frame of a scene."""
    fixture = parity.load("bev", "detector_small")
    meta = dict(CLASSES=list(NUSCENES), mmcv_version="1.4.0")
    torch.save(dict(meta=meta, state_dict=published_state(fixture)), tmp_path / "published.pth")
    model = load_published(CONFIG, tmp_path / "published.pth", model=fixture["model"], task=fixture["task"]).double()
    assert model.class_names == list(NUSCENES)
    view, last = None, None
    for frame, want in zip(fixture["frames"], fixture["outputs"], strict=True):
        given = frame["images"]
        images = parity.seeded(given["seed"], given["shape"]) * given["scale"]
        pixels = (images + images.new_tensor(MEAN_BGR).view(3, 1, 1)).flip(2) / 255
        mean, std = (images.new_tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        bus = torch.tensor(frame["can_bus"], dtype=torch.float64)
        change = bus.clone()
        change[[0, 1, 2, 17]] -= (bus if last is None else last)[[0, 1, 2, 17]]
        last = bus
        beyond, far = change[16] - torch.atan2(change[1], change[0]), change[:2].norm()
        shown = dict(images=(pixels - mean) / std, can_bus=change[None])
        shown["motion"] = torch.stack([far * beyond.sin(), far * beyond.cos(), change[17]])[None]
        shown["lidar2img"] = torch.tensor(frame["lidar2img"], dtype=torch.float64)[None]
        with torch.no_grad():
            for level, wanted in zip(model.lifter.maps(shown["images"])[0], want["maps"], strict=True):
                parity.assert_equal("map", level, wanted)
            view, _ = model.look(shown, view)
            parity.assert_equal("view", view.flatten(2).permute(2, 0, 1), want["bev"])
            assert_outputs(model.head, model.head(view), want)


# --- files


def small(**kwargs) -> BevDetector:
    torch.manual_seed(0)
    lifter = timm.create_model("dfa3d_bev_s", **SMALL | kwargs)
    net = BevDetector(lifter, DecoderHead(16, 10, (6, 5), lifter.pc_range, **HEAD))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return net.eval()


NAMES = {  # ours -> published, in this order
    r"^lifter\.backbone\.": "img_backbone.",
    r"^lifter\.fpn\.inner_blocks\.(\d)\.0\.": r"img_neck.lateral_convs.\1.conv.",
    r"^lifter\.fpn\.layer_blocks\.(\d)\.0\.": r"img_neck.fpn_convs.\1.conv.",
    r"^lifter\.extra\.conv\.": "img_neck.fpn_convs.2.conv.",
    r"^lifter\.depth\.": "pts_dpt_head.",
    r"^lifter\.query$": "pts_bbox_head.bev_embedding.weight",
    r"^lifter\.row_embed$": "pts_bbox_head.positional_encoding.row_embed.weight",
    r"^lifter\.column_embed$": "pts_bbox_head.positional_encoding.col_embed.weight",
    r"^lifter\.level_embed$": "pts_bbox_head.transformer.level_embeds",
    r"^lifter\.camera_embed$": "pts_bbox_head.transformer.cams_embeds",
    r"^lifter\.can_bus_mlp\.4\.": "pts_bbox_head.transformer.can_bus_mlp.norm.",
    r"^lifter\.(can_bus_mlp|encoder)\.": r"pts_bbox_head.transformer.\1.",
    r"^head\.query\.": "pts_bbox_head.query_embedding.",
    r"^head\.kinds\.": "pts_bbox_head.cls_branches.",
    r"^head\.codes\.": "pts_bbox_head.reg_branches.",
    r"^head\.reference\.": "pts_bbox_head.transformer.reference_points.",
    r"^head\.layers\.": "pts_bbox_head.transformer.decoder.layers.",
    r"(\.layers\.\d\.)attn\.": r"\1attentions.0.attn.",
    r"(\.layers\.\d\.)tsa\.": r"\1attentions.0.",
    r"(\.layers\.\d\.)proj\.": r"\1attentions.1.output_proj.",
    r"(\.layers\.\d\.)(cross|sca)\.": r"\1attentions.1.",
    r"\.mlp\.fc1\.": ".ffns.0.layers.0.0.",
    r"\.mlp\.fc2\.": ".ffns.0.layers.1.",
    r"\.norm1\.": ".norms.0.",
    r"\.norm2\.": ".norms.1.",
    r"\.norm3\.": ".norms.2.",
}


def as_published(net: BevDetector) -> dict[str, Tensor]:
    """A detector's tensors as a published file has them."""
    tensors = {}
    for key, value in net.state_dict().items():
        value = value.clone()
        if key == "lifter.backbone.conv1.weight":
            value = value[:, [2, 1, 0]]  # BGR
        if key == "lifter.level_embed":
            value = torch.cat([value, torch.randn(4 - len(value), value.shape[1])])
        if re.match(r"head\.codes\.\d\.4", key):  # sin r = -cos yaw, cos r = -sin yaw
            value = torch.cat([value[:6], -value[7:8], -value[6:7], value[8:]])
        for ours, theirs in NAMES.items():
            key = re.sub(ours, theirs, key) if not key.startswith("pts_dpt_head") else key
        tensors[key] = value
    return tensors | {"pts_bbox_head.code_weights": torch.arange(10.0)}


def write(path, tensors, **meta):
    torch.save(dict(meta=dict(CLASSES=NUSCENES) | meta, state_dict=tensors), path)
    return path


def load(file, config=CONFIG, model=None, **kwargs):
    return load_published(config, file, model=SMALL | (model or {}), task=dict(head_args=HEAD), **kwargs)


def assert_same(one: BevDetector, other: BevDetector) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_every_tensor_of_a_file_has_its_place(tmp_path):
    """Also with further levels, and where the depth is known and the file has a network that is never used."""
    net = small()
    loaded = load(write(tmp_path / "s.pth", as_published(net)))
    assert_same(net, loaded)
    assert loaded.class_names == list(NUSCENES) and not loaded.training
    assert torch.equal(loaded.head.code_weights, torch.arange(10.0))
    assert loaded.lifter.rotation_center == (100.0, 100.0)
    assert (loaded.pretrained_cfg["mean"], loaded.pretrained_cfg["std"]) == (MEAN, STD)
    net = small(strides=(16, 32, 64), depth_network=False)
    tensors = as_published(net) | {"pts_dpt_head.depth_conv.5.weight": torch.ones(112, 16, 1, 1)}
    known = load(write(tmp_path / "b.pth", tensors), "nuscenes/dfa3d_bev_b_lidar", dict(strides=(16, 32, 64)))
    assert_same(net, known)
    lifter = timm.create_model(
        "dfa3d_bev_s", **SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "s.pth"))
    )
    assert torch.equal(lifter.backbone.layer4[0].conv2.weight, loaded.lifter.backbone.layer4[0].conv2.weight)
    assert torch.equal(lifter.camera_embed, loaded.lifter.camera_embed)


def test_classes_of_a_file(tmp_path):
    """In the file's order; without names, nuScenes' in the published one."""
    torch.save(as_published(small()), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth").class_names == list(NUSCENES)
    other = [*NUSCENES[5:], *NUSCENES[:5]]
    assert load(write(tmp_path / "other.pth", as_published(small()), CLASSES=other)).class_names == other


def without(word: str):
    return lambda tensors: {key: value for key, value in tensors.items() if word not in key}


OTHERS = {
    "truncated": (
        without("encoder.layers.0.norms.1"),
        {},
        r"bird's-eye view and does not fit: it lacks lifter\.enc",
    ),
    "another view": (
        lambda tensors: tensors,
        dict(bev_size=(5, 5)),
        r"lifter\.query is \(30, 16\) there and \(25, 16\) here",
    ),
    "another backbone": (lambda tensors: tensors, dict(backbone="resnet18", backbone_args={}), "needs model.backbone="),
    "a backbone": (
        lambda tensors: {k[13:]: v for k, v in tensors.items() if k.startswith("img_backbone.")},
        {},
        "of a backbone or a classifier, not of a whole detector in a bird's-eye view",
    ),
    "another detector": (
        lambda tensors: {"backbone.a": torch.ones(1), "roi_head.bbox_head.fc_cls.weight": torch.ones(1)},
        {},
        "of a Faster R-CNN, not of a whole detector in a bird's-eye view",
    ),
}


@pytest.mark.parametrize(("change", "model", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(change, model, message, tmp_path):
    file = write(tmp_path / "other.pth", change(as_published(small())))
    with pytest.raises(UserError, match=message):
        load(file, model=model)


def test_other_tasks_are_refused(tmp_path):
    file = write(tmp_path / "bev.pth", as_published(small()))
    with pytest.raises(UserError, match="is of a detector in a bird's-eye view, not of a whole detector or segmenter"):
        load_published("coco/mask_rcnn_biformer_s_1x", file)
    with pytest.raises(UserError, match=r"needs task\.head=decoder"):
        load_published(CONFIG, file, model=SMALL, task=dict(head="centre"))


class Data:
    def __init__(self, *names):
        self.class_names = list(names)


def test_training_starts_from_files(tmp_path):
    """Of the detector itself; with other classes, whose layers start anew; of another one, whose backbone is taken."""
    net = small()
    file = write(tmp_path / "bev.pth", as_published(net))
    build = lambda *names, file: Lift(Data(*names), head="decoder", head_args=HEAD).model(  # noqa: E731
        "dfa3d_bev_s", checkpoint=file, new_head=True, **SMALL
    )
    assert_same(net, build(*NUSCENES, file=file))
    other = build("car", "cow", file=file)
    assert other.head.kinds[1][6].weight.shape == (2, 16)
    assert torch.equal(other.head.kinds[1][3].weight, net.head.kinds[1][3].weight)
    neck = {key: value for key, value in as_published(net).items() if key.startswith(("img_backbone.", "img_neck."))}
    fcos = {key.removeprefix("img_"): value for key, value in neck.items()} | {"bbox_head.conv.weight": torch.ones(1)}
    task = Lift(Data(*NUSCENES), head="decoder", head_args=HEAD)
    start = task.model("dfa3d_bev_s", checkpoint=write(tmp_path / "fcos.pth", fcos), new_head=True, **SMALL)
    assert_same(net.lifter.backbone, start.lifter.backbone)
    assert_same(net.lifter.fpn, start.lifter.fpn)
    assert "detector of another kind: its backbone and its neck are taken" in task.messages[-1]
    with pytest.raises(UserError, match=r"backbone is not a ResNet-101 .*: backbone\.layer2\.0\.bn1\.bias is missing"):
        build(*NUSCENES, file=write(tmp_path / "cut.pth", without("layer2.0.bn1.bias")(fcos)))


# --- parts


def test_backbone():
    """Strides, where they are, and what the deformable convolutions are without an offset: half of an ordinary one."""
    torch.manual_seed(0)
    model = ResNetDCN((8, 16, 32), depths=(1, 1, 2, 1), width=4).eval()
    shapes = [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))]
    assert shapes == [(1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)] and model.channels == [32, 64, 128]
    block = model.layer3[0]
    assert block.conv1.stride == block.downsample[0].stride == (2, 2) and model.layer1[0].conv1.stride == (1, 1)
    x = torch.randn(2, 16, 5, 7)
    want = 0.5 * torch.nn.functional.conv2d(x, block.conv2.weight, padding=1)
    torch.testing.assert_close(block.conv2(x), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        block.conv2.conv_offset.bias[0:18:2] = 1.0  # every tap a row further down
        block.conv2.conv_offset.bias[18:] = 20.0  # and in full
    down = torch.nn.functional.pad(x, (1, 1, 0, 2))
    want = torch.nn.functional.conv2d(down, block.conv2.weight)
    torch.testing.assert_close(block.conv2(x), want, rtol=1e-5, atol=1e-5)


def test_memory_is_turned_about_a_point():
    """Cell by cell, as the published formula has it."""
    view, angle, center = torch.arange(1.0, 64.0).reshape(1, 1, 7, 9), 33.0, (11.0, 4.0)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    want = torch.zeros_like(view)
    for i in range(7):
        for j in range(9):
            X, Y = j + 0.5 - center[0], i + 0.5 - center[1]
            x, y = round(cos * X - sin * Y + center[0] - 0.5), round(sin * X + cos * Y + center[1] - 0.5)
            if 0 <= x < 9 and 0 <= y < 7:
                want[0, 0, i, j] = view[0, 0, y, x]
    assert torch.equal(align(view, torch.tensor([angle]), center), want) and 10 < (want > 0).sum() < 63
    assert not torch.equal(align(view, torch.tensor([angle])), want)


def test_samples_that_start_a_scene_have_no_memory():
    lifter = small().lifter
    torch.manual_seed(0)
    given = dict(images=torch.randn(2, 1, 3, 32, 64), can_bus=torch.randn(2, 18))
    camera = torch.tensor([[40.0, 32, 0, 0], [0, 16, -40, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    given["lidar2img"] = camera.expand(2, 1, 4, 4)
    memory = dict(prev_bev=torch.randn(2, 16, 6, 5), motion=torch.tensor([[1.0, 9.0, 5.0]] * 2))
    fresh, carried = lifter(**given), lifter(**given, **memory)
    mixed = lifter(**given, **memory, scene_start=torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([fresh[0], carried[1]]), rtol=1e-5, atol=1e-5)
    assert (fresh[1] - carried[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"scene_start must be \(2,\), got \(1,\)"):
        lifter(**given, scene_start=torch.tensor([True]))


def test_inverse_sigmoid():
    p = torch.tensor([0.0, 1e-6, 0.3, 1.0], dtype=torch.float64)
    want = [math.log(1e-5), math.log(1e-5 / (1 - 1e-6)), math.log(0.3 / 0.7), math.log(1e5)]
    torch.testing.assert_close(inverse_sigmoid(p), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_large_sizes_are_kept():
    """The published decoder does not limit them."""
    head = DecoderHead(16, 1, (4, 4), (-8, -8, -2, 8, 8, 2), queries=1, layers=1, heads=2, hidden=8)
    codes = torch.zeros(1, 1, 10)
    codes[..., 2], codes[..., 3] = 6.0, -7.0
    ((boxes, _, _),) = head.boxes([(torch.zeros(1, 1, 1), codes)])
    torch.testing.assert_close(boxes[0, 3:6], torch.tensor([-7.0, 6.0, 0.0]).exp())
