"""Our models as OpenMMLab's files: read back here and, where they are installed, by mmdet and mmseg (make test-all)."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from saccade.train.convert import convert
from saccade.train.models import build, detectors, load_published
from saccade.train.models.build import create_features
from saccade.train.models.detectors import Detector
from saccade.train.models.openmmlab import to_openmmlab
from saccade.train.models.resize import resize_uint8, scaled_size
from saccade.train.models.segmenter import Inference, Segmenter
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["bolt", "nut", "washer"]
DETECTOR = dict(
    channels=16, hidden=16, proposals=20, score_thresh=0.05, detections=5, test_size=(64, 96), anchor_scale=4
)
KINDS = ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"]
RECIPE = """
from saccade.train.data.ade20k import Ade20k
from saccade.train.tasks.segment import Segment

model = dict(name="resnet18", out_indices=(1, 2, 3, 4))
data = dict(type=Ade20k, root="nowhere", scale=(96, 64))
task = dict(type=Segment, channels=8)
"""
MULTIPLE = dict(upernet=1, semantic_fpn=32)  # of segmenters, by head


def make(kind: str = "mask_rcnn", seed: int = 0) -> nn.Module:
    """A small detector or segmenter on a ResNet-18."""
    torch.manual_seed(seed)
    if kind in KINDS:
        body = create_features("resnet18", (2, 3, 4) if kind == "retinanet" else (1, 2, 3, 4))
        return spread(detectors.create(kind, body, 3, **DETECTOR))
    body = create_features("resnet18", (1, 2, 3, 4))
    inference = Inference((96, 64), multiple=MULTIPLE[kind])
    return spread(Segmenter(body, 3, kind, channels=8, auxiliary=kind == "upernet", inference=inference))


def spread(model: nn.Module) -> nn.Module:
    """Give the layers that score and shift larger weights, as training does: a new model's results are all alike."""
    for name, parameter in model.named_parameters():
        if re.search(r"(_cls|_reg|conv_logits|conv_seg)\.weight$", name):
            nn.init.normal_(parameter, std=0.3)
            if "conv_seg" in name:  # what all channels share would choose one class for all pixels
                parameter.data -= parameter.data.mean(1, keepdim=True)
        elif "retina_cls.bias" in name:
            nn.init.zeros_(parameter)
    return model.eval()


def open_again(kind: str, file: Path) -> nn.Module:
    """The model of a file, in the recipe of the kind's small models."""
    if kind in KINDS:
        return load_published("scenes/mask_rcnn_resnet18", file, task=DETECTOR | dict(detector=kind))
    recipe = file.with_name("recipe.py")
    recipe.write_text(RECIPE)
    task = dict(head=kind, auxiliary=0.4 * (kind == "upernet"), multiple=MULTIPLE[kind])
    return load_published(str(recipe), file, task=task)


@pytest.mark.parametrize("kind", ["retinanet", "cascade_mask_rcnn", "upernet"])
def test_files_are_read_back(kind, tmp_path, monkeypatch):
    """All weights and the classes, by reading the file once."""
    model = make(kind)
    torch.save(to_openmmlab(model, NAMES), tmp_path / "out.pth")
    load, reads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: reads.append(args) or load(*args, **kwargs))
    again = open_again(kind, tmp_path / "out.pth")
    assert len(reads) == 1 and again.class_names == NAMES
    ours = again.state_dict()
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def finished(folder: Path, recipe: str, model: nn.Module, inputs: dict, *changes: str) -> Path:
    """A run's folder with this model."""
    folder.mkdir()
    settings = config.load(ROOT / f"configs/{recipe}.py", changes)
    (folder / "config.py").write_text(config.dump(settings))
    if isinstance(model, (Detector, Segmenter)):
        build.save_whole(model, folder, inputs, NAMES)
    else:
        build.export(model, folder, inputs, NAMES)
    return folder


def test_runs_are_converted(command, tmp_path):
    """A detector's checkpoint and config, in their own words; files that exist stay."""
    model = make()
    changes = [f"task.{key}={value}" for key, value in DETECTOR.items()]
    folder = finished(tmp_path / "run", "scenes/mask_rcnn_resnet18", model, {}, *changes)
    code, out, _ = command("convert", folder, tmp_path / "out.pth", "--to", "openmmlab")
    assert code == 0 and "out.pth" in out and "out.py" in out
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content["meta"]["CLASSES"] == tuple(NAMES)
    assert torch.equal(content["state_dict"]["backbone.body.conv1.weight"], model.state_dict()["backbone.conv1.weight"])
    sections = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(content["meta"]["cfg"]).body}
    assert (tmp_path / "out.py").read_text() == content["meta"]["cfg"]
    section = sections["model"]
    assert section["type"] == "MaskRCNN" and section["backbone"]["out_indices"] == (1, 2, 3, 4)
    assert section["data_preprocessor"]["mean"] == [123.675, 116.28, 103.53]
    assert section["test_cfg"]["rcnn"]["max_per_img"] == 5 and section["test_cfg"]["rpn"]["nms_pre"] == 20
    code, _, error = command("convert", folder, tmp_path / "out.pth", "--to", "openmmlab")
    assert code == 2 and "out.pth exists: give another name" in error


def test_backbones_of_classifiers_are_converted(command, tmp_path):
    torch.manual_seed(0)
    model = build.create("test_resnet", 3)
    inputs = dict(input_size=(3, 32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    folder = finished(tmp_path / "run", "finetune/folder", model, inputs, "model.name=test_resnet")
    assert command("convert", folder, tmp_path / "out.pth", "--to", "openmmlab")[0] == 0
    tensors = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert all(key.startswith("backbone.body.") for key in tensors)
    body = create_features("test_resnet", checkpoint=folder)
    assert {"backbone.body." + key for key in body.state_dict()} == tensors.keys()
    assert torch.equal(tensors["backbone.body.conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(UserError, match=r"none has no config\.py and model\.safetensors: give the folder"):
        convert(tmp_path / "none", tmp_path / "out.pth")
    with pytest.raises(UserError, match=r"must be a file that ends in \.pth, got .*out\.bin: give .*out\.pth"):
        convert(tmp_path, tmp_path / "out.bin")


# --- the libraries themselves


def installed(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build_theirs(library: str, content: dict) -> nn.Module:
    """The model as mmdet or mmseg builds it from the file's own config, with the file's weights, all of them."""
    import saccade.integrations.mmdet  # noqa: F401
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    importlib.import_module(f"{library}.models")
    registry = importlib.import_module(f"{library}.registry").MODELS
    with DefaultScope.overwrite_default_scope(library):
        model = registry.build(Config.fromstring(content["meta"]["cfg"], ".py").model)
    model.load_state_dict(content["state_dict"])
    return model.eval()


def picture() -> torch.Tensor:
    """A mosaic of blocks (3, 50, 70)."""
    torch.manual_seed(5)
    blocks = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    return blocks.repeat_interleave(10, 1).repeat_interleave(10, 2)


def detect(theirs: nn.Module, ours: Detector) -> dict[str, torch.Tensor]:
    """What mmdet's detector finds on the picture, resized and normalised as ours does it."""
    from mmdet.structures import DetDataSample

    size = scaled_size(50, 70, ours.test_size)
    batch = ours.batch([resize_uint8(picture().double(), size)])
    shape = tuple(batch.images.shape[2:])
    facts = dict(img_shape=size, ori_shape=(50, 70), scale_factor=(size[1] / 70, size[0] / 50))
    sample = DetDataSample(metainfo=facts | dict(pad_shape=shape, batch_input_shape=shape))
    with torch.no_grad():
        (result,) = theirs.predict(batch.images, [sample])
    return result.pred_instances


@pytest.mark.exhaustive
@installed("saccade.integrations", "mmcv", "mmdet")
@pytest.mark.parametrize("kind", KINDS)
def test_mmdet_detects_the_same(kind, tmp_path, float64, monkeypatch):
    """Ours opened by mmdet, and mmdet's opened by us: equal boxes, scores, labels and masks."""
    import saccade.integrations.mmdet  # noqa: F401
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head

    paste = fcn_mask_head._do_paste_mask  # which converts masks, and not boxes, to float32
    monkeypatch.setattr(
        fcn_mask_head, "_do_paste_mask", lambda masks, boxes, *sizes, **k: paste(masks, boxes.float(), *sizes, **k)
    )
    for seed, back in ((0, False), (1, True)):
        ours = make(kind, seed)
        content = to_openmmlab(ours, NAMES)
        theirs = build_theirs("mmdet", content)
        if back:  # mmdet writes the file
            meta = dict(dataset_meta=dict(classes=tuple(NAMES)), epoch=1)
            torch.save(dict(meta=meta, state_dict=theirs.state_dict()), tmp_path / "theirs.pth")
            ours = open_again(kind, tmp_path / "theirs.pth")
            assert ours.class_names == NAMES
        with torch.no_grad():
            (result,) = ours([picture().double() / 255])
        found = detect(theirs, ours)
        assert len(result["scores"]) > 2
        torch.testing.assert_close(result["scores"], found.scores, rtol=1e-9, atol=0)
        torch.testing.assert_close(result["boxes"], found.bboxes, rtol=0, atol=1e-6)
        assert torch.equal(result["labels"] - 1, found.labels)
        if "masks" in result:  # mmdet pastes in float32: pixels at the threshold may differ
            differ = (result["masks"][:, 0] >= 0.5) != found.masks
            assert (differ <= ((result["masks"][:, 0] - 0.5).abs() < 1e-5)).all()


@pytest.mark.exhaustive
@installed("saccade.integrations", "mmcv", "mmseg")
@pytest.mark.parametrize("kind", MULTIPLE)
def test_mmseg_labels_the_same(kind, tmp_path, float64):
    from mmseg.structures import SegDataSample

    for seed, back in ((0, False), (1, True)):
        ours = make(kind, seed)
        theirs = build_theirs("mmseg", to_openmmlab(ours, NAMES))
        if back:
            meta = dict(dataset_meta=dict(classes=tuple(NAMES)))
            torch.save(dict(meta=meta, state_dict=theirs.state_dict()), tmp_path / "theirs.pth")
            ours = open_again(kind, tmp_path / "theirs.pth")
            assert ours.class_names == NAMES
        size = ours.inference.size(50, 70, 1.0)
        view = resize_uint8(resize_uint8(picture().double(), size), ours.inference.multiple_of(size))[None] / 255
        normalised = (view - ours.mean) / ours.std
        facts = dict(img_shape=tuple(view.shape[2:]), ori_shape=(50, 70), pad_shape=tuple(view.shape[2:]))
        sample = SegDataSample(metainfo=facts | dict(padding_size=[0, 0, 0, 0], flip=False))
        with torch.no_grad():
            torch.testing.assert_close(ours(view), theirs(normalised, mode="tensor"), rtol=1e-9, atol=1e-12)
            (labels,) = ours([picture()])
            (result,) = theirs.predict(normalised, [sample])
        assert len(labels.unique()) > 1 and torch.equal(labels, result.pred_sem_seg.data[0])
