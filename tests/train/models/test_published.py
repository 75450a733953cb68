"""Files that OpenMMLab's tools wrote: what is read, what is refused, and whole published models (make test-all)."""

import math
import zlib

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from saccade.train.models import load_published
from saccade.train.models.build import create_features
from saccade.train.models.class_names import read_class_names
from saccade.train.models.detectors import create
from saccade.train.models.published import describe, read_published
from saccade.train.runtime.errors import UserError
from support import parity
from support.images import coarse_image

SMALL = dict(channels=16, hidden=16, proposals=20, score_thresh=0.0, detections=3, test_size=(64, 96), anchor_scale=4)
NAMES = ("bolt", "nut", "washer")


def write(path, tensors, **meta):
    """Write a file as mmdet 2 does."""
    torch.save(dict(meta=dict(CLASSES=NAMES, mmdet_version="2.25.3", **meta), state_dict=tensors), path)
    return path


def detector(kind: str = "mask_rcnn", classes: int = 3):
    torch.manual_seed(0)
    return create(
        kind, create_features("resnet18", (1, 2, 3, 4) if kind != "retinanet" else (2, 3, 4)), classes, **SMALL
    )


def load(path, kind: str = "mask_rcnn", **kwargs):
    return load_published("scenes/mask_rcnn_resnet18", path, task=SMALL | dict(detector=kind), **kwargs)


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_rcnn", "retinanet"])
def test_detectors_of_files(kind, tmp_path):
    """With meta that holds NumPy scalars, an optimizer's state and EMA's second copy; its class names are kept."""
    model = detector(kind).eval()
    tensors = model.state_dict()
    tensors |= {f"ema_{key.replace('.', '_')}": value + 1 for key, value in tensors.items()}
    hook = dict(best_score=np.float64(0.4), best_ckpt="x.pth", epoch=np.int64(3))
    file = write(tmp_path / "epoch_12.pth", tensors, hook_msgs=hook)
    loaded = load(file, kind)
    assert loaded.class_names == list(NAMES) == read_class_names(file) and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    image = torch.rand(3, 60, 90)
    for one, other in zip(model([image])[0].values(), loaded([image])[0].values(), strict=True):
        assert torch.equal(one, other)


def test_bare_state_dict(tmp_path):
    """Without meta the number of classes is read off the head."""
    torch.save(detector().state_dict(), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth").class_names == ["class 0", "class 1", "class 2"]
    assert read_class_names(tmp_path / "bare.pth") is None


class Bomb:
    def __reduce__(self):
        return (open, ("bomb went off", "w"))


def without(word: str):
    return lambda tensors: {key: value for key, value in tensors.items() if word not in key}


def backbone_of(name: str) -> dict[str, torch.Tensor]:
    return {f"backbone.{key}": value for key, value in create_features(name).state_dict().items()}


OTHERS = {
    "classes": (
        lambda tensors: detector(classes=5).state_dict(),
        r"of a Mask R-CNN .*fc_cls.*\(6, 16\) there and \(4, 16\) here.*number of classes",
    ),
    "another detector": (
        lambda tensors: detector("retinanet").state_dict(),
        "is of a RetinaNet and does not fit: it lacks neck",
    ),
    "truncated": (without("fpn_convs.2"), r"it lacks neck\.fpn_convs\.2\.conv\.weight"),
    "more of a head": (
        lambda tensors: tensors | {"roi_head.extra.weight": torch.ones(2)},
        r"it has roi_head\.extra\.weight",
    ),
    "less of a backbone": (without("backbone.layer3.0.conv1.weight"), "its backbone does not fit resnet18"),
    "more of a backbone": (
        lambda tensors: tensors | {"backbone.more.weight": torch.ones(2)},
        r"its backbone does not fit resnet18 \(it has more.weight\)",
    ),
    "another backbone": (
        lambda tensors: without("backbone.")(tensors) | backbone_of("resnet26"),
        r"is of a Mask R-CNN, and its backbone does not fit resnet18 \(it has layer1\.0\.conv3\.weight",
    ),
    "segmenter": (
        lambda tensors: backbone_of("resnet18") | {"decode_head.psp_modules.0.1.conv.weight": torch.ones(2)},
        r"is of a segmenter with UPerNet and does not fit: it lacks neck\.\S+; .*it has decode_head\.psp_modules",
    ),
    "mmdet 1": (
        lambda tensors: (
            without("roi_head.")(tensors)
            | {key.removeprefix("roi_head."): value for key, value in tensors.items() if key.startswith("roi_head.")}
        ),
        r"is of an R-CNN of mmdet 1, whose heads have other names .*convert it with upgrade_model_version\.py",
    ),
    "bare": (
        lambda tensors: {key[9:]: value for key, value in tensors.items() if key.startswith("backbone.")},
        "is of a backbone or a classifier, not of a whole",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(change, message, tmp_path):
    file = write(tmp_path / "other.pth", change(detector().state_dict()))
    with pytest.raises(UserError, match=message):
        load(file, num_classes=3)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_published(tmp_path / "none.pth")
    torch.save(dict(state_dict={}, meta=Bomb()), tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth holds Python objects \(io\.open\), which are not loaded"):
        read_published(tmp_path / "bomb.pth")
    assert not (tmp_path / "bomb went off").exists()
    whole = write(tmp_path / "whole.pth", {"x": torch.zeros(5000)}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.pth can't be read \(.*\): it is damaged or incomplete; download"):
        read_published(tmp_path / "cut.pth")
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))  # as mmdet 3 and mmseg 1 write
    torch.save(dict(state_dict={}, message_hub=hub), tmp_path / "newer.pth")
    message = r"holds Python objects \(mmengine\.\S+HistoryBuffer\), as files of mmdet 3 .*save its state_dict alone"
    with pytest.raises(UserError, match=message):
        read_published(tmp_path / "newer.pth")
    torch.save(dict(meta={}), tmp_path / "empty.pth")
    with pytest.raises(UserError, match="has no weights"):
        read_published(tmp_path / "empty.pth")


def test_kinds_are_named():
    assert describe({"bbox_head.fc_cls.weight": torch.ones(1)}).startswith("an R-CNN of mmdet 1")
    assert describe({"decode_head.scale_heads.0.0.conv.weight": torch.ones(1)}) == "a segmenter with Semantic FPN"
    assert describe({"layer1.0.conv1.weight": torch.ones(1)}) == "a backbone or a classifier"


# --- whole published models


def state(fixture: dict) -> dict[str, torch.Tensor]:
    """The file's tensors, the constant ones too."""
    tensors = parity.weights(fixture)
    for key, kind, shape in fixture["state"]:
        if kind != "buffer":
            tensors[key] = tensors[key] * fixture.get("scale", {}).get(key, 1.0) + fixture.get("shift", {}).get(
                key, 0.0
            )
        elif key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(0)
        else:  # Swin's relative_position_index
            side = math.isqrt(shape[0])
            places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
            apart = places[:, :, None] - places[:, None] + side - 1
            tensors[key] = apart[0] * (2 * side - 1) + apart[1]
    return tensors


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["agent_swin_t_cascade_mask_rcnn", "biformer_s_mask_rcnn", "davit_t_retinanet"])
def test_published_detectors(name, tmp_path, float64):
    """Boxes to 1e-6 pixels, scores and losses to 1e-9, labels and the area of masks exactly."""
    fixture = parity.load("detectors", name)
    file = write(tmp_path / "epoch_12.pth", state(fixture))
    images = [coarse_image(**image).double() / 255 for image in fixture["pictures"]["list"]]
    arguments = dict(num_classes=fixture["num_classes"])
    model = load_published(fixture["config"], file, task=fixture.get("base_task", {}) | fixture["task"], **arguments)
    with torch.no_grad():
        results = model(images)
    for result, want in zip(results, fixture["detections"], strict=True):
        torch.testing.assert_close(result["boxes"], torch.tensor(want["boxes"]).view(-1, 4), rtol=0, atol=1e-6)
        torch.testing.assert_close(result["scores"], torch.tensor(want["scores"]), rtol=0, atol=1e-9)
        assert result["labels"].tolist() == want["labels"]
        for mask, facts in zip(result.get("masks", ()), want.get("masks", ())):
            assert abs(int((mask >= 0.5).sum()) - facts["area"]) <= facts["near"]
    train = fixture["train"]
    model = load_published(fixture["config"], file, task=fixture["task"] | train["task"], **arguments).train()
    model.body.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses = model(
        [coarse_image(**image).double() / 255 for image in train["pictures"]],
        [target_of(target, image) for target, image in zip(train["targets"], train["pictures"])],
    )
    assert losses.keys() == train["losses"].keys()
    for key, want in train["losses"].items():
        assert losses[key].item() == pytest.approx(want, rel=1e-9), key


def target_of(target: dict, image: dict) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(target["boxes"]), image["height"], image["width"], dtype=torch.uint8)
    for mask, rectangles in zip(masks, target["mask_rects"]):
        for x0, y0, x1, y1 in rectangles:
            mask[y0:y1, x0:x1] = 1
    numbers = {name: torch.tensor(target[name]) for name in ("boxes", "labels", "iscrowd")}
    return numbers | dict(masks=masks)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["fpn_biformer_s_a", "upernet_davit_t_a"])
def test_published_segmenters(name, tmp_path, float64):
    """Logits and losses to 1e-9, label maps of whole images, windows, several scales and flips pixel for pixel."""
    fixture = parity.load("segmenters", name)
    file = tmp_path / "latest.pth"
    torch.save(
        dict(meta=dict(CLASSES=[f"class {i}" for i in range(fixture["num_classes"])]), state_dict=state(fixture)), file
    )
    arguments = dict(num_classes=fixture["num_classes"])
    model = load_published(fixture["config"], file, **arguments)
    want = fixture["logits"]
    images = torch.from_numpy(
        np.random.Generator(np.random.PCG64(want["input"]["seed"])).random(want["input"]["shape"])
    )
    with torch.no_grad():
        parity.assert_equal("logits", model(images), want["decode"])
        for want in fixture["label_maps"]:
            model = load_published(fixture["config"], file, task=want["inference"], **arguments)
            (labels,) = model([blocks(want["picture"]["seed"], *want["picture"]["size"])])
            assert zlib.crc32(labels.numpy().astype(np.uint8).tobytes()) == want["crc32"], want["name"]


def blocks(seed: int, height: int, width: int) -> torch.Tensor:
    """A uint8 image (3, height, width) as the segmenters' fixtures were recorded on."""
    generator = np.random.Generator(np.random.PCG64(seed))
    coarse = generator.integers(0, 256, (3, -(-height // 16), -(-width // 16))).repeat(16, 1).repeat(16, 2)
    noise = generator.integers(-24, 25, (3, height, width))
    return torch.from_numpy(np.clip(coarse[:, :height, :width] + noise, 0, 255).astype(np.uint8))
