"""Segmenters: their heads against plain sums, label maps against whole logits, weights from files."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from saccade.train.models import segmenter
from saccade.train.models.build import create, create_features, save_whole
from saccade.train.models.fcn import FCNHead
from saccade.train.models.fpn import FPN
from saccade.train.models.resize import resize_uint8
from saccade.train.models.segmenter import Inference, Segmenter
from saccade.train.models.semantic_fpn import SemanticFPN
from saccade.train.models.upernet import UPerNet
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.segment import Segment
from saccade.train.visual import label_maps
from support.images import coarse_image
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cross_entropy, interpolate

DATA = SimpleNamespace(
    class_names=["a", "b", "c"], scale=None, inputs=lambda cfg: dict(mean=cfg["mean"], std=cfg["std"])
)


def tiny(head: str = "upernet", name: str = "test_resnet", inference: Inference | None = None, **kwargs) -> Segmenter:
    torch.manual_seed(0)
    net = Segmenter(create_features(name, **kwargs), 3, head, channels=8, inference=inference)
    torch.nn.init.normal_(net.decode_head.conv_seg.weight)
    with torch.no_grad():  # no class ahead of the others
        logits = net.eval()(coarse_image(0, 64, 64)[None] / 255)
        net.decode_head.conv_seg.bias.sub_(logits.mean((0, 2, 3)))
    return net.eval()


def maps(batch: int = 2) -> list[torch.Tensor]:
    """Of odd sizes."""
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 13, 18), (6, 7, 9), (8, 4, 5), (10, 2, 3))
    return [torch.randn(batch, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def randomised(head: torch.nn.Module) -> torch.nn.Module:
    """In float64, statistics and affine parts of norms no longer trivial, nothing dropped."""
    torch.manual_seed(1)
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return head.double()


def layer(module, x):
    """Convolution, BatchNorm by its statistics, ReLU."""
    weight, bn = module.conv.weight, module.bn
    x = conv2d(x, weight, padding=weight.shape[2] // 2)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return (x * scale.view(-1, 1, 1) + (bn.bias - bn.running_mean * scale).view(-1, 1, 1)).relu()


def up(x, like):
    return interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def test_upernet_as_mmsegmentation_defines_it():
    head, x = randomised(UPerNet((4, 6, 8, 10), 3, channels=5)).eval(), maps()
    pooled = [up(layer(pool[1], adaptive_avg_pool2d(x[3], n)), x[3]) for pool, n in zip(head.psp_modules, (1, 2, 3, 6))]
    laterals = [layer(lateral, m) for lateral, m in zip(head.lateral_convs, x)]
    laterals.append(layer(head.bottleneck, torch.cat([x[3], *pooled], 1)))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + up(laterals[i], laterals[i - 1])
    levels = [layer(smooth, lateral) for smooth, lateral in zip(head.fpn_convs, laterals)] + [laterals[3]]
    fused = layer(head.fpn_bottleneck, torch.cat([up(level, x[0]) for level in levels], 1))
    expected = conv2d(fused, head.conv_seg.weight, head.conv_seg.bias)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-10)


def test_upernet_fuses_in_parts_what_training_fuses_at_once():
    head, x = randomised(UPerNet((4, 6, 8, 10), 3, channels=5)), maps()
    in_parts = head.eval()(x)
    for module in head.modules():
        module.training = module is head or not isinstance(module, torch.nn.BatchNorm2d)
    torch.testing.assert_close(head(x), in_parts, rtol=1e-10, atol=1e-10)


def test_semantic_fpn_as_mmsegmentation_defines_it():
    """Levels are doubled as often as they are coarser, whatever the sizes: these overshoot."""
    x = maps()
    neck = FPN((4, 6, 8, 10), 7).double()
    head = randomised(SemanticFPN(7, (4, 8, 16, 32), 3, channels=5)).eval()
    laterals = [conv2d(m, unit.conv.weight, unit.conv.bias) for m, unit in zip(x, neck.lateral_convs)]
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + interpolate(laterals[i], laterals[i - 1].shape[2:], mode="nearest")
    total = 0
    for level, (lateral, unit, scale) in enumerate(zip(laterals, neck.fpn_convs, head.scale_heads)):
        y = conv2d(lateral, unit.conv.weight, unit.conv.bias, padding=1)
        convolutions = [module for module in scale if not isinstance(module, torch.nn.Upsample)]
        assert len(convolutions) == max(1, level)
        for convolution in convolutions:
            y = layer(convolution, y)
            if level:
                y = interpolate(y, [2 * side for side in y.shape[2:]], mode="bilinear", align_corners=False)
        total = total + up(y, x[0])
    expected = conv2d(total, head.conv_seg.weight, head.conv_seg.bias)
    torch.testing.assert_close(head(neck(x)), expected, rtol=1e-10, atol=1e-10)


def test_auxiliary_head():
    head, x = randomised(FCNHead((4, 6, 8, 10), 3, channels=5)).eval(), maps()
    expected = conv2d(layer(head.convs[0], x[2]), head.conv_seg.weight, head.conv_seg.bias)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("biformer_t", dict(dims=(32,) * 4, depths=(1,) * 4, topks=(1, 2, 4, -2), n_win=2, out_norms=True)),
        ("agent_deit_t", dict(dim=32, depth=4, heads=2, agents=9, agent_blocks=1)),  # its maps are all of stride 16
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_backbone_learns(head, name, kwargs):
    """At an odd size; every parameter gets a gradient."""
    net = tiny(head, name, **kwargs).train()
    logits, auxiliary = net(torch.rand(2, 3, 96, 64))
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert logits.shape[:2] == (2, 3)
    without = {key for key, parameter in net.named_parameters() if parameter.grad is None}
    assert not without


def average(net: Segmenter, image: torch.Tensor, sizes: list, flips: tuple, windows=None) -> torch.Tensor:
    """Average the softmax (K, H, W) over views, all of it in memory, as mmsegmentation does.

    sizes: of each view, or a tuple of sizes that the image is resized to one after the other.
    """
    total = 0
    for steps in sizes:
        pixels = image.double()
        for size in steps if isinstance(steps[0], tuple) else (steps,):
            pixels = resize_uint8(pixels, size)
        for flip in flips:
            view = pixels[None].float() / 255
            view = view.flip(3) if flip else view
            logits, count = torch.zeros(1, 3, *size), torch.zeros(1, 1, *size)
            for top, left, height, width in windows or [(0, 0, *size)]:
                part = net(view[..., top : top + height, left : left + width])
                place = ..., slice(top, top + height), slice(left, left + width)
                logits[place] += interpolate(part, (height, width), mode="bilinear", align_corners=False)
                count[place] += 1
            logits = interpolate(logits / count, image.shape[1:], mode="bilinear", align_corners=False)
            total = total + (logits.flip(3) if flip else logits).softmax(1)[0]
    return total


INFERENCES = {
    "as it is": (Inference(), [(53, 91)], (False,), None),
    "resized": (Inference(scale=(128, 64)), [(64, 110)], (False,), None),
    "limited by the longer side": (Inference(scale=(60, 64)), [(37, 64)], (False,), None),
    "multiples": (Inference(scale=(128, 64), multiple=32), [((64, 110), (64, 128))], (False,), None),
    "scales and flips": (
        Inference(scale=(128, 64), scales=(0.5, 1.25), flip=True), [(32, 55), (80, 137)], (False, True), None,
    ),
    "windows": (
        Inference(crop=(32, 40), stride=(20, 30)), [(53, 91)], (False,),
        [(t, le, 32, 40) for t in (0, 20, 21) for le in (0, 30, 51)],
    ),
    "windows larger than the image": (
        Inference(crop=(64, 64), stride=(32, 32)), [(53, 91)], (False,), [(0, 0, 53, 64), (0, 27, 53, 64)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INFERENCES)
@torch.no_grad()
def test_label_maps_are_those_of_whole_logits(name, monkeypatch):
    inference, sizes, flips, windows = INFERENCES[name]
    net = tiny(inference=inference)
    image = coarse_image(3, 53, 91)
    expected = average(net, image, sizes, flips, windows)
    monkeypatch.setattr(segmenter, "ROWS", 3 * 91 * 7)  # seven rows at a time
    (labels,) = net([image])
    assert labels.shape == (53, 91) and labels.unique().numel() > 1
    top = expected.topk(2, 0).values
    clear = top[0] - top[1] > 1e-5  # but where rounding decides
    assert torch.equal(labels[clear], expected.argmax(0)[clear]) and clear.float().mean() > 0.99
    assert torch.equal(net([image / 255])[0], labels)


@torch.no_grad()
def test_images_of_one_pixel_and_of_several_sizes():
    net = tiny()
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in ((1, 1), (33, 2), (40, 40))]
    assert [tuple(labels.shape) for labels in net(images)] == [(1, 1), (33, 2), (40, 40)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(crop=(32, 32), stride=(40, 32)), r"stride=\(40, 32\) must be at most crop=\(32, 32\)"),
        (dict(stride=(40, 32)), r"stride=\(40, 32\) must be at most crop=None"),
        (dict(scales=()), r"scales=\(\) must be positive factors"),
    ],
)
def test_mistaken_inference(given, said):
    with pytest.raises(UserError, match=said):
        Segment(DATA, **given)


def test_layer_decay_and_weight_decay_of_the_whole():
    kwargs = dict(dims=(32,) * 4, depths=(1, 1, 2, 1), topks=(1, 2, 4, -2), n_win=2, out_norms=True)
    net = tiny(name="biformer_t", **kwargs)
    layers = group_parameters(net, net.group_matcher(), reverse=True)
    heads = {layers[name] for name in layers if name.startswith(("decode_head", "auxiliary_head"))}
    assert heads == {max(layers.values())}
    assert layers["backbone.model.stem.0.weight"] == 0
    assert (
        layers["backbone.model.stages.2.blocks.0.mlp.fc1.weight"]
        < layers["backbone.model.stages.2.blocks.1.mlp.fc1.weight"]
    )
    optimizer = create_optimizer_v2(net, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(net.decode_head.fpn_bottleneck.conv.weight)] == (1.0, 0.1) and rates[
        id(net.decode_head.fpn_bottleneck.bn.weight)
    ] == (1.0, 0.0)
    assert rates[id(net.backbone.model.stem[0].weight)][0] == 0.5 ** max(layers.values())
    pvt = dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, dense_agents=(4,) * 4)
    net = Segmenter(create_features("agent_pvt_t", **pvt), 3, channels=8, no_decay=("*.query_block",))
    exempt = net.no_weight_decay()
    assert "*.query_block" in exempt and all("backbone." in name or "*" in name for name in exempt)


def test_weights_of_a_classifier_and_of_other_segmenters(tmp_path):
    job = Segment(DATA, channels=8)
    torch.manual_seed(0)
    classifier = create("test_resnet", 10)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    net = job.model("test_resnet", checkpoint=tmp_path / "classifier.pth", new_head=True)
    assert torch.equal(net.backbone.state_dict()["layer3.0.conv1.weight"], classifier.layer3[0].conv1.weight)
    with pytest.raises(UserError, match="has no segmentation head"):
        job.model("test_resnet", checkpoint=tmp_path / "classifier.pth")

    save_whole(net, tmp_path, {}, ["a", "b", "c"])
    again = job.model("test_resnet", checkpoint=tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in again.state_dict().items())
    more = SimpleNamespace(**vars(DATA) | dict(class_names=list("abcde")))
    other = Segment(more, channels=8).model("test_resnet", checkpoint=tmp_path / "model.safetensors", new_head=True)
    unlike = [k for k, v in other.state_dict().items() if v.shape != net.state_dict()[k].shape]
    assert unlike == [
        f"{head}.conv_seg.{key}" for head in ("auxiliary_head", "decode_head") for key in ("weight", "bias")
    ]
    assert torch.equal(other.decode_head.fpn_bottleneck.conv.weight, net.decode_head.fpn_bottleneck.conv.weight)
    with pytest.raises(UserError, match=r"model\.safetensors is of a segmenter with UPerNet and does not fit"):
        Segment(DATA, channels=16).model("test_resnet", checkpoint=tmp_path / "model.safetensors")


@pytest.mark.parametrize("weights", [None, (1.0, 4.0, 0.0)])
def test_loss_is_mmsegmentations(weights):
    """Cross-entropy by the class's weight, ignored pixels as zeros in the mean, and 0.4 times the auxiliary head's."""
    job = Segment(DATA, channels=8, drop_rate=0.0, class_weights=weights)
    torch.manual_seed(0)
    net = job.model("test_resnet").train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    images, labels = torch.rand(2, 3, 32, 40), torch.randint(3, (2, 32, 40))
    labels[0, :20] = 255
    twin = copy.deepcopy(net)
    loss, said = job.loss(net, (images, labels))
    parts = []
    for logits in twin(images):
        enlarged = interpolate(logits, (32, 40), mode="bilinear", align_corners=False)
        lost = cross_entropy(enlarged, labels, ignore_index=255, reduction="none")
        parts.append((lost if weights is None else lost * torch.tensor([*weights, *[0.0] * 253])[labels]).mean())
    torch.testing.assert_close(loss, parts[0] + 0.4 * parts[1])
    torch.testing.assert_close(said["head"], parts[0].detach())
    labels.fill_(255)
    assert job.loss(net, (images, labels))[0] == 0


def test_class_weights_are_one_per_class():
    with pytest.raises(UserError, match=r"^task\.class_weights=\(1, 2\) must be 3 numbers of 0 or more, one per class"):
        Segment(DATA, class_weights=(1, 2))


def test_colours_overlays_and_legends():
    colors = label_maps.class_colors(150)
    assert len({tuple(color) for color in colors[:150].tolist()}) == 150 and not colors[150:].any()
    image, labels = np.full((4, 6, 3), 100, np.uint8), np.array([[0, 1, 255, 0, 0, 0]] * 4)
    drawn = label_maps.draw_overlay(image, labels, 2, strength=0.5)
    for label, column in ((0, 0), (1, 1), (255, 2)):
        assert np.abs(drawn[0, column] - (50 + colors[label] / 2)).max() <= 0.5 or label == 1
    assert label_maps.present_labels(labels) == [0, 1]


SCRIPT = """
import sys, torch
from saccade.train.models.segmenter import Inference, Segmenter
from saccade.train.models.build import create_features
torch.set_num_threads(1)
inference = Inference(crop=(512, 512), stride=(341, 341)) if sys.argv[1] == "windows" else Inference()
body = create_features("biformer_t", depths=(1, 1, 1, 1), n_win=8, out_norms=True)
net = Segmenter(body, 150, channels=int(sys.argv[2]), inference=inference).eval()
with torch.no_grad():
    (found,) = net([torch.zeros(3, 1024, 2048, dtype=torch.uint8)])
assert found.shape == (1024, 2048)
# Not getrusage's maximum: that starts from what the process that forked this one held.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's largest memory from /proc")
@pytest.mark.parametrize(("kind", "channels"), [("whole", 512), ("windows", 64)])
def test_large_pictures_in_three_gigabytes(kind, channels):
    """2048x1024 with 150 classes on BiFormer-T's widths; windows need little but for what they give."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind, str(channels)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 < 3e9
