"""Detectors around timm's models, and the task that trains, tests and predicts with them."""

import math
from functools import partial

import pytest
import timm
import torch
from saccade.train.models import detectors
from saccade.train.models.body import load_whole
from saccade.train.models.build import create, create_features
from saccade.train.models.cascade import CascadeHeads
from saccade.train.runtime.errors import UserError
from timm.optim import create_optimizer_v2
from torchvision.ops import MultiScaleRoIAlign, box_iou

SMALL = dict(
    biformer_t=dict(dims=(32, 64, 64, 64), depths=(1,) * 4, n_win=2, topks=(1, 2, 4, -2)),
    davit_t=dict(dims=(32, 32, 64, 64), depths=(1,) * 4),
    agent_swin_t=dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, agent_blocks=(1, 1, 0, 0)),
    agent_pvt_t=dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4),
    patnet_t0=dict(dims=(8, 16, 16, 32), depths=(1,) * 4, attn_heads=2),
    ela_resnet18=dict(layers=(1,) * 4, channels=(32,) * 4),
    test_resnet={},
    test_convnext={},
)
TINY = dict(channels=16, hidden=32, rois=32, proposals=40, test_size=(64, 128))


def small(detector: str = "mask_rcnn", name: str = "test_resnet", classes: int = 3, **kwargs):
    """A detector of seconds on a small backbone."""
    arguments = SMALL[name]
    body = create_features(name, partial(detectors.levels, detector), **arguments)
    return detectors.create(detector, body, classes, **TINY | kwargs)


def scene(height: int = 64, width: int = 96) -> tuple[torch.Tensor, dict]:
    """A dark picture with a red square (label 1) and a tall green box (label 2), and its target."""
    image = torch.full((3, height, width), 0.2)
    boxes = torch.tensor([[10.0, 12.0, 40.0, 42.0], [56.0, 8.0, 76.0, 56.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for i, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[i, y0:y1, x0:x1] = 0.9
        masks[i, y0:y1, x0:x1] = 1
    return image, dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)


@pytest.mark.parametrize("name", ["test_resnet", "biformer_t"])
def test_features_from_a_classifier(name, tmp_path):
    """The maps are those of the classifier whose weights are read, its own head being left out."""
    torch.manual_seed(0)
    classifier = timm.create_model(name, num_classes=7, **SMALL[name]).eval()
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    body = create_features(name, (1, 3), tmp_path / "weights.pth", **SMALL[name]).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        for ours, theirs in zip(body(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert "state_dict" not in body.pretrained_cfg


def test_features_with_norms_of_their_own(tmp_path):
    """Which a classifier's file lacks: they start as they are made, and the maps are the normalised ones."""
    torch.manual_seed(0)
    arguments = SMALL["biformer_t"]
    classifier = timm.create_model("biformer_t", num_classes=7, **arguments).eval()
    torch.save(dict(model=classifier.state_dict()), tmp_path / "weights.pth")
    body = create_features("biformer_t", None, tmp_path / "weights.pth", out_norms=True, **arguments).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, plain in zip(body(x), classifier.forward_intermediates(x, intermediates_only=True), strict=True):
            expected = torch.nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2], eps=1e-6)
            torch.testing.assert_close(ours, expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_features_refuse_what_does_not_fit(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet.pth does not fit biformer_t"):
        create_features("biformer_t", None, tmp_path / "resnet.pth", **SMALL["biformer_t"])
    with pytest.raises(UserError, match=r"did you mean n_win"):
        create_features("biformer_t", n_wim=3)
    with pytest.raises(UserError, match=r"unknown model biformer_tt, did you mean biformer_t"):
        create_features("biformer_tt")
    with pytest.raises(UserError, match=r"there is no checkpoint"):
        create_features("test_resnet", checkpoint=tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"test_resnet can't be built for its maps with out_indices=\(9,\)"):
        create_features("test_resnet", (9,))


@pytest.mark.parametrize("name", SMALL)
def test_pyramid(name):
    """Of any model, maps of strides 4 to 32 and one more; pictures of any size are padded to what they need."""
    torch.manual_seed(0)
    model = small(name=name).eval()
    assert model.backbone.strides == [4, 8, 16, 32]
    maps = model.backbone(torch.randn(1, 3, 96, 160))
    assert [tuple(y.shape) for y in maps.values()] == [(1, 16, 96 // s, 160 // s) for s in (4, 8, 16, 32)] + [
        (1, 16, 2, 3)
    ]
    with torch.no_grad():
        (found,) = model([torch.rand(3, 61, 87)])
    assert found["masks"].shape[1:] == (1, 61, 87) and len(found["boxes"]) <= 100
    assert (found["boxes"][:, 2] <= 87).all() and (found["boxes"] >= 0).all()


def test_anchors():
    """Eight strides wide at ratios 1/2, 1, 2; RetinaNet's four strides and two sizes between, from stride 8 to 128."""
    cells = small("mask_rcnn").rpn.anchor_generator.cell_anchors
    assert [cell[1].tolist() for cell in cells] == [[-4 * s, -4 * s, 4 * s, 4 * s] for s in (4, 8, 16, 32, 64)]
    width, height = (cells[0][2, 2:] - cells[0][2, :2]).tolist()
    assert height / width == pytest.approx(2, rel=0.05) and height * width == pytest.approx(32**2, rel=0.05)
    cells = small("retinanet").anchor_generator.cell_anchors
    assert len(cells) == 5 and [len(cell) for cell in cells] == [9] * 5
    sides = sorted({round((w * h).sqrt().item()) for _, _, w, h in 2 * cells[0]})
    assert all(any(abs(side - 32 * 2 ** (i / 3)) < 1.5 for i in range(3)) for side in sides)


LEARNING = dict(
    retinanet=dict(steps=240, channels=32, anchor_scale=3),
    mask_rcnn=dict(steps=120, channels=32, rois=16),
    cascade_rcnn=dict(steps=150, hidden=64, anchor_scale=6),
)


@pytest.mark.parametrize("detector", LEARNING)
def test_learns(detector):
    """Trained on one picture, it finds both objects on that picture as large again, in that one's own pixels."""
    torch.manual_seed(0)
    arguments = dict(LEARNING[detector])
    steps = arguments.pop("steps")
    model = small(detector, norm_eval=True, **arguments)
    image, target = scene()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps))
        sum(model([image], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad()
    large = torch.nn.functional.interpolate(image[None], scale_factor=2, mode="bilinear")[0]
    with torch.no_grad():
        (found,) = model.eval()([large])
    for label, box, mask in zip((1, 2), target["boxes"], target["masks"]):
        mine = (found["labels"] == label) & (found["scores"] > 0.3)
        overlaps = box_iou(found["boxes"][mine], 2 * box[None])[:, 0]
        assert overlaps.max() > 0.8, label
        if detector == "mask_rcnn":
            true = mask.repeat_interleave(2, 0).repeat_interleave(2, 1).bool()
            seen = found["masks"][mine][overlaps.argmax(), 0] > 0.5
            assert (seen & true).sum() / (seen | true).sum() > 0.8, label


def test_batchnorm_in_evaluation():
    """With norm_eval the body's running statistics stay, while its weights learn and the heads' norms do their own."""
    image, target = scene()
    for norm_eval in (True, False):
        torch.manual_seed(0)
        model = small("cascade_rcnn", norm_eval=norm_eval).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running_mean" in name}
        sum(model([image], [target]).values()).backward()
        moved = {name for name, tensor in before.items() if not torch.equal(model.state_dict()[name], tensor)}
        assert any(name.startswith("roi_heads.") for name in moved)
        assert any(name.startswith("backbone.body.") for name in moved) == (not norm_eval)
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "layers"), [("test_resnet", 6), ("test_convnext", 11), ("biformer_t", 6)])
def test_layer_decay(name, layers):
    """timm's layer decay: the stem least, each block twice its predecessor, everything after the body alike."""
    model = small(name=name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {n: scale[id(p)] for n, p in model.named_parameters()}
    whole = create(name, 3, **SMALL[name])
    expected = create_optimizer_v2(whole, "adamw", lr=1.0, layer_decay=0.5, filter_bias_and_bn=False)
    theirs = {id(p): group["lr_scale"] for group in expected.param_groups for p in group["params"]}
    least = min(theirs.values())
    assert len(set(scales.values())) == len(set(theirs.values())) == layers
    assert {scales[n] for n in scales if not n.startswith("backbone.body")} == {1.0}
    shapes = sorted((tuple(p.shape), theirs[id(p)] / least) for n, p in whole.named_parameters() if "head" not in n)
    ours = {n: p for n, p in model.named_parameters() if n.startswith("backbone.body.")}
    mine = sorted((tuple(p.shape), scales[n] / min(scales.values())) for n, p in ours.items())
    assert set(mine) <= set(shapes)


def test_no_weight_decay():
    """Vectors, what the body's own model names, and what the config names."""
    model = small(name="agent_swin_t", no_decay=("*.attn.key_*",))
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1)
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in free and p.ndim > 1}
    assert all(name.endswith("relative_bias") or ".attn.key_" in name for name in names)
    assert sum(name.endswith("relative_bias") for name in names) == 2
    assert sum(".attn.key_" in name for name in names) == 6


def test_checkpointed_gradients():
    """Equal to those without."""
    image, target = scene()
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small(name="biformer_t")
        model.set_grad_checkpointing(enable)
        sum(model([image], [target]).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert any(getattr(m, "grad_checkpointing", False) for m in model.backbone.body.modules())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_autocast(detector):
    """Under bfloat16 boxes and scores are float32, and losses near those of float32."""
    torch.manual_seed(0)
    model = small(detector, norm_eval=True)
    image, target = scene()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.train()([image], [target]))
    for name, loss in losses[0].items():
        assert losses[1][name].dtype == torch.float32 and losses[1][name].isfinite()
        if detector == "retinanet" or "objectness" in name or "rpn" in name:  # others' samples depend on proposals
            assert losses[1][name].item() == pytest.approx(loss.item(), rel=0.05), name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.eval()([image])
    assert all(found[name].dtype == torch.float32 for name in ("boxes", "scores"))


def cascade(rois: int = 8) -> CascadeHeads:
    return CascadeHeads(MultiScaleRoIAlign(["0"], 7, 2), 4, 8, 2, rois=rois, score_thresh=0.3, detections=2)


def test_cascade_samples():
    """The overlap that makes a positive rises by stage; true boxes are among the sampled and marked."""
    target = dict(boxes=torch.tensor([[0.0, 0.0, 10.0, 10.0]]), labels=torch.tensor([2]))
    # Overlaps of 0.55, 0.65, 0.75 and 0.
    proposals = torch.tensor([[0, 0, 10, 5.5], [0, 0, 10, 6.5], [0, 0, 10, 7.5], [20, 20, 30, 30]])
    for stage, expected in enumerate([[2, 2, 2, 0, 2], [0, 2, 2, 0, 2], [0, 0, 2, 0, 2]]):
        (boxes,), (matched,), (labels,), (added,) = cascade(100)._sample(stage, [proposals], [target])
        assert labels.tolist() == expected and added.tolist() == [False] * 4 + [True]
        assert torch.equal(boxes[4], target["boxes"][0]) and matched.tolist() == [0] * 5
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    (boxes,), _, (labels,), _ = cascade(100)._sample(0, [proposals], [nothing])
    assert torch.equal(boxes, proposals) and not labels.any()


def test_cascade_detections():
    """By hand: the lower of two that overlap goes, the low score goes, the best two of the rest stay."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9.0], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 60, 10]])
    scores = torch.tensor([[0, 0.9, 0.1], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.5, 0.4, 0.1], [0, 0.99, 0.01]])
    found = cascade()._detect(boxes, scores)
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert found["labels"].tolist() == [1, 2] and found["scores"].tolist() == pytest.approx([0.9, 0.7])


def test_whole_detectors_weights(tmp_path):
    """Go into one of other classes but for what has the classes' size; another detector's are refused."""
    torch.manual_seed(0)
    source, other = small(classes=3), small(classes=5)
    tensors = source.state_dict()
    load_whole(other, tensors, tmp_path, new_head=True)
    unlike = {n for n, t in other.state_dict().items() if n not in tensors or not torch.equal(t, tensors[n])}
    predictors = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    assert unlike and all(name.startswith(predictors) for name in unlike)
    with pytest.raises(UserError, match=r"is of another model: roi_heads.box_predictor.cls_score.weight is \(4, 32\)"):
        load_whole(other, tensors, tmp_path, new_head=False)
    with pytest.raises(UserError, match="is of another model"):
        load_whole(small("retinanet"), tensors, tmp_path, new_head=True)


@pytest.mark.parametrize(
    ("detector", "name"),
    [("mask_rcnn", "test_resnet"), ("cascade_mask_rcnn", "test_resnet"), ("mask_rcnn", "biformer_t")],
)
def test_onnx(detector, name, tmp_path):
    """The exported detector finds on other pictures of its size what ours finds."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which runs the exported file, is not installed")
    torch.manual_seed(0)
    model = small(detector, name, score_thresh=0.0, detections=10).eval()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(detectors.to_onnx(model, (60, 90), tmp_path / "model.onnx"), options)
    for picture in (scene(60, 90)[0], torch.rand(3, 60, 90)):
        with torch.no_grad():
            (found,) = model([picture])
        keys = ("boxes", "scores", "labels", "masks")
        assert len(found["boxes"]) == 10
        for key, exported in zip(keys, session.run(list(keys), {"image": picture.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(exported), found[key], rtol=1e-4, atol=1e-4)
