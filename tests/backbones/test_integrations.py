"""The zoo in other libraries: each test where its library is installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from saccade.train.data import scenes


def installed(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


OURS = "saccade.integrations"
mmdet, mmseg = installed(OURS, "mmcv", "mmdet"), installed(OURS, "mmcv", "mmseg")
SMALL = dict(biformer_t=[64, 128, 256, 512], swin_tiny_patch4_window7_224=[96, 192, 384, 768])


def published(library: str, file: str):
    """A model's config as the library ships it."""
    from mmengine.config import Config

    folder = Path(importlib.util.find_spec(library).origin).parent / ".mim/configs/_base_/models"
    return Config.fromfile(folder / file).model


@pytest.fixture(scope="module")
def build():
    """build(library, config) -> the model, its weights begun."""
    import saccade.integrations.mmdet  # noqa: F401
    from mmengine.registry import DefaultScope

    def made(library: str, config):
        importlib.import_module(f"{library}.models")
        registry = importlib.import_module(f"{library}.registry").MODELS
        with DefaultScope.overwrite_default_scope(library):
            model = registry.build(config)
            model.init_weights()
        return model

    return made


def samples(count: int, size: int = 96) -> tuple[list, list]:
    """Generated scenes, as mmdet takes them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    images, said = [], []
    for index in range(count):
        made = scenes.scene("train", index, size=size)
        edges = [(np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))) for mask in made.masks]
        boxes = [[c[0], r[0], c[-1] + 1, r[-1] + 1] for c, r in edges]
        masks = BitmapMasks(made.masks.astype(np.uint8), size, size)
        sample = DetDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(made.labels), masks=masks
        )
        images.append(torch.from_numpy(made.image).permute(2, 0, 1))
        said.append(sample)
    return images, said


@mmdet
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("file", ["mask-rcnn_r50_fpn.py", "retinanet_r50_fpn.py"])
def test_mmdet_trains_and_predicts(build, file, name):
    """MMDetection's own config with one of our backbones in it: a step lowers the loss on the pictures it was taken on;
    every part of the backbone gets a gradient; in evaluation boxes come back."""
    config = published("mmdet", file)
    config.backbone = dict(type="SaccadeBackbone", name=name, out_indices=(0, 1, 2, 3))
    if name.startswith("swin"):
        config.backbone.update(img_size=96)
    config.neck.in_channels = SMALL[name]
    torch.manual_seed(0)
    from mmengine.model import revert_sync_batchnorm

    model = revert_sync_batchnorm(build("mmdet", config))  # as mmengine's Runner does without a GPU
    images, said = samples(2)
    data = model.data_preprocessor(dict(inputs=images, data_samples=said), training=True)

    def loss():
        torch.manual_seed(1)  # of the samples that the heads draw
        return model.parse_losses(model(**data, mode="loss"))[0]

    model.train()
    stepper = torch.optim.AdamW(model.parameters(), 1e-4)
    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
    stepper.step()
    assert loss() < before
    model.eval()
    with torch.no_grad():
        found = model(**model.data_preprocessor(dict(inputs=images, data_samples=said)), mode="predict")
    for sample in found:
        instances = sample.pred_instances
        assert len(instances.bboxes) == len(instances.scores) == len(instances.labels) <= 100
        assert "mask" not in file or instances.masks.shape[1:] == (96, 96)


@mmseg
@pytest.mark.parametrize("file", ["upernet_r50.py", "fpn_r50.py"])
def test_mmseg_trains_and_predicts(build, file):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    config = published("mmseg", file)
    config.backbone = dict(type="SaccadeBackbone", name="biformer_t", out_indices=(0, 1, 2, 3))
    channels = SMALL["biformer_t"]
    for head in [config[key] for key in ("decode_head", "auxiliary_head") if key in config]:
        head.in_channels = channels[2] if isinstance(head.in_channels, int) else channels
        head.update(num_classes=11, norm_cfg=dict(type="BN"))
    if "neck" in config:
        config.neck.in_channels, config.decode_head.in_channels = channels, [256] * 4
    config.data_preprocessor.size, config.pretrained = (96, 96), None
    torch.manual_seed(0)
    model = build("mmseg", config)
    images, said = [], []
    for index in range(2):
        made = scenes.scene("train", index, size=96)
        labels = np.zeros((96, 96), np.int64)
        for mask, label in zip(made.masks, made.labels):
            labels[mask] = label + 1
        sample = SegDataSample(metainfo=dict(img_shape=(96, 96), ori_shape=(96, 96)))
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
        images.append(torch.from_numpy(made.image).permute(2, 0, 1))
        said.append(sample)
    data = model.data_preprocessor(dict(inputs=images, data_samples=said), training=True)
    model.train()
    stepper = torch.optim.AdamW(model.parameters(), 1e-4)

    def loss():
        torch.manual_seed(1)  # of what dropout drops
        return model.parse_losses(model(**data, mode="loss"))[0]

    before = loss()
    before.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    stepper.step()
    assert loss() < before
    model.eval()
    model.test_cfg = type(config)(mode="slide", crop_size=(64, 64), stride=(32, 32))
    with torch.no_grad():
        found = model(**model.data_preprocessor(dict(inputs=images, data_samples=said)), mode="predict")
    for sample in found:
        assert sample.pred_sem_seg.data.shape == (1, 96, 96) and sample.pred_sem_seg.data.max() < 11


@mmdet
def test_backbone_is_timm_s_model_with_the_file_s_weights(build, tmp_path):
    """Weights of a whole classifier by timm's path; maps as timm's; mmengine's init leaves them; norm_eval."""
    from mmengine.registry import MODELS
    from saccade.integrations.mmdet import SaccadeBackbone

    torch.manual_seed(3)
    whole = timm.create_model("test_resnet", num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    config = dict(type="SaccadeBackbone", name="test_resnet", checkpoint=str(tmp_path / "weights.pth"))
    made = MODELS.build(config | dict(out_indices=(1, 3), norm_eval=True))
    made.init_weights()
    assert made.channels == [32, 192] and made.strides == [4, 16]
    x = torch.randn(2, 3, 64, 64)
    expected = whole.eval().forward_intermediates(x, indices=(1, 3), intermediates_only=True)
    for ours, theirs in zip(made.eval()(x), expected, strict=True):
        assert torch.equal(ours, theirs)
    norms = [m for m in made.train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and made.training and not any(norm.training for norm in norms)
    assert all(norm.training for norm in SaccadeBackbone("test_resnet").train().modules() if "Norm" in str(type(norm)))
    swin = SaccadeBackbone("swin_tiny_patch4_window7_224", img_size=64)
    assert [y.shape[1] for y in swin(x)] == swin.channels == SMALL["swin_tiny_patch4_window7_224"]
    with pytest.raises(ValueError, match=r"init_cfg must be None, got .*: weights come by checkpoint or pretrained"):
        SaccadeBackbone("test_resnet", init_cfg=dict(type="Pretrained"))
    with pytest.raises(ValueError, match="pretrained must be True or False, got 'open-mmlab://r': set the model's"):
        SaccadeBackbone("test_resnet", pretrained="open-mmlab://r")
    with pytest.raises(ValueError, match=r"checkpoint must be a file of weights, and there is no none.pth"):
        SaccadeBackbone("test_resnet", checkpoint="none.pth")


@installed(OURS, "mmengine")
def test_extension_computes_what_torchvision_does():
    from saccade.integrations.mmdet import make_extension
    from torchvision.ops import nms, roi_align

    module, g = make_extension(), torch.Generator().manual_seed(0)
    corner, sides = torch.rand(40, 2, generator=g) * 20, torch.rand(40, 2, generator=g) * 12 + 1
    boxes, scores = torch.cat([corner, corner + sides], 1), torch.rand(40, generator=g)
    assert torch.equal(module.nms(boxes, scores, iou_threshold=0.4, offset=0), nms(boxes, scores, 0.4))
    rois = torch.cat([torch.arange(40)[:, None] % 2, boxes], 1).double()
    x = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64, requires_grad=True)
    y = roi_align(x, rois, (5, 4), 0.5, 2, True)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(y, x, dy)
    size = dict(aligned_height=5, aligned_width=4, spatial_scale=0.5, sampling_ratio=2, pool_mode=1, aligned=True)
    out, dx = torch.empty_like(y), torch.zeros_like(x)
    module.roi_align_forward(x.detach(), rois, out, None, None, **size)
    module.roi_align_backward(dy, rois, None, None, dx, **size)
    assert torch.equal(out, y) and torch.equal(dx, expected)
    with pytest.raises(NotImplementedError, match="softnms needs mmcv with its compiled operators, got mmcv-lite"):
        module.softnms(boxes, scores)
    with pytest.raises(NotImplementedError, match="nms with offset=1 needs mmcv"):
        module.nms(boxes, scores, 0.4, 1)
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode=max needs mmcv"):
        module.roi_align_forward(x, rois, out, None, None, **size | dict(pool_mode=0))


@installed("transformers")
def test_detr_of_transformers_trains_and_predicts():
    """Its TimmBackbone takes our names once saccade.backbones is imported: no code of ours is in between."""
    import saccade.backbones  # noqa: F401
    from transformers import DetrConfig, DetrForObjectDetection, TimmBackbone, TimmBackboneConfig

    backbone = TimmBackboneConfig(backbone="biformer_t", out_indices=(2, 3), use_pretrained_backbone=False)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    alone = TimmBackbone(backbone).eval()
    ours = timm.create_model("biformer_t", features_only=True, out_indices=(2, 3)).eval()
    ours.load_state_dict(alone._backbone.state_dict())
    for theirs, expected in zip(alone(x).feature_maps, ours(x), strict=True):
        assert torch.equal(theirs, expected)

    torch.manual_seed(0)
    small = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    small |= dict(encoder_attention_heads=2, decoder_attention_heads=2, num_queries=10, num_labels=10, dropout=0.0)
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **small)).train()
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.4]])
    labels = [dict(class_labels=torch.tensor([1, 2]), boxes=boxes) for _ in range(2)]
    stepper, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(4):
        loss = model(pixel_values=x, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.eval()(pixel_values=x).pred_boxes.shape == (2, 10, 4)


@installed("transformers")
@pytest.mark.parametrize("name", ["biformer_t", "patnet_t0"])
def test_run_folder_opens_in_transformers(tmp_path, name):
    """By its AutoModel and pipeline, with the classes' names and the preprocessing; a fused PATNet too."""
    from saccade.train.models.build import create, export
    from transformers import AutoModelForImageClassification, pipeline

    model = create(name, 3, depths=(1, 1, 1, 1)).eval()
    if name == "patnet_t0":
        model.fuse()
    inputs = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    export(model, tmp_path, inputs, ["cat", "dog", "owl"])
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert opened.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened(x).logits, model(x))
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        scores = model((pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).softmax(1)[0]
    predictions = pipeline("image-classification", model=str(tmp_path))(Image.fromarray(pixels.numpy()))
    assert {p["label"]: p["score"] for p in predictions} == pytest.approx(
        dict(zip(["cat", "dog", "owl"], scores.tolist())), abs=1e-4
    )
