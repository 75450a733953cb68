"""Time Mask R-CNN on ResNet-50 beside torchvision's and, where it is installed, mmdet's: inference and training steps.

    python tools/benchmark_detectors.py
    python tools/benchmark_detectors.py --size 400 672 --runs 5 --vs torchvision

One image of the size (height, width) a step, fp32, BatchNorm in evaluation mode, all parameters trained. mmdet's model
is built from the config and the weights of ours; torchvision's has its own. The layer that scores classes has
large weights in all of them, so that each model finds the 100 objects whose masks a trained one would compute. Models
run alternately, and the ratio is the median of the ratios of consecutive runs. CPU seconds are those of all threads:
beside other programs they are the figure to trust. Writes benchmark_detectors.json to --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", nargs="+", choices=["torchvision", "mmdet"], help="default: those that are installed")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1333], help="height and width (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import torch
import torchvision
from rich.console import Console
from rich.table import Table
from saccade.train.models import detectors
from saccade.train.models.build import create_features
from saccade.train.models.openmmlab import to_openmmlab
from saccade.train.runtime import measure
from torch import Tensor, nn

CLASSES = 80


def build_ours(size: tuple[int, int]) -> nn.Module:
    levels = lambda strides: detectors.levels("mask_rcnn", strides)  # noqa: E731
    body = create_features("resnet50", levels)
    model = detectors.create("mask_rcnn", body, CLASSES, norm_eval=True, test_size=sorted(size))
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.5)
    return model


def build_torchvision(size: tuple[int, int]) -> nn.Module:
    short, long = sorted(size)
    sizes = dict(num_classes=CLASSES + 1, min_size=short, max_size=long)
    maker = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = maker(weights=None, weights_backbone=None, trainable_backbone_layers=5, **sizes)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    return model


def build_mmdet(ours: nn.Module) -> nn.Module:
    """Build mmdet's model from the config and the weights of ours."""
    import saccade.integrations.mmdet  # noqa: F401  (before mmdet.models)

    import mmdet.models  # noqa: F401  isort: skip
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    content = to_openmmlab(ours, [str(i) for i in range(CLASSES)])
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(Config.fromstring(content["meta"]["cfg"], ".py").model)
    model.load_state_dict(content["state_dict"])
    return model


def make_target(size: tuple[int, int], count: int = 10) -> dict[str, Tensor]:
    """Draw boxes of 40 to 290 pixels, with masks that fill them."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    sides = (40 + 250 * torch.rand(count, 2, generator=generator)).clamp(max=min(size) / 2)
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat((corners, corners + sides), 1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
        mask[top:bottom, left:right] = 1
    return dict(boxes=boxes, labels=torch.randint(1, CLASSES + 1, (count,), generator=generator), masks=masks)


def step_of(model: nn.Module, mode: str, size: tuple[int, int], device: torch.device) -> Callable[[], Any]:
    """Make a step on one image for a model that is called as torchvision's detectors are."""
    image, target = torch.rand(3, *size, device=device), {k: v.to(device) for k, v in make_target(size).items()}

    def infer() -> int:
        with torch.inference_mode():
            return len(model.eval()([image])[0]["boxes"])

    def train() -> None:
        evaluate_norms(model.train())
        sum(model([image], [target]).values()).backward()
        model.zero_grad()

    return infer if mode == "inference" else train


def mmdet_step_of(model: nn.Module, mode: str, size: tuple[int, int], device: torch.device) -> Callable[[], Any]:
    """Make the same step for mmdet's model, its own preprocessing of the image included."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    image, target = torch.randint(0, 256, (3, *size), dtype=torch.uint8), make_target(size)
    facts = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))

    def batch(training: bool) -> dict:
        sample = DetDataSample(metainfo=facts)
        masks = BitmapMasks(target["masks"].numpy(), *size)
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"] - 1, masks=masks)
        return model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), training)

    def infer() -> int:
        model.eval()
        with torch.inference_mode():
            return len(model(**batch(False), mode="predict")[0].pred_instances.bboxes)

    def train() -> None:
        evaluate_norms(model.train())
        model.parse_losses(model(**batch(True), mode="loss"))[0].backward()
        model.zero_grad()

    return infer if mode == "inference" else train


def evaluate_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def cpu_time_of(step: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
    """Wrap a step so that the CPU seconds of each run are appended to a list."""

    def timed() -> None:
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)

    return timed


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if min(args.size) < 64:
        parser.error(f"--size must be two sides of 64 pixels or more, got {args.size}")
    if args.runs < 1:
        parser.error(f"--runs must be 1 or more, got {args.runs}")
    peers = args.vs or ["torchvision", *(["mmdet"] if find_spec("mmdet") and find_spec("mmcv") else [])]
    if "mmdet" in peers and not (find_spec("mmdet") and find_spec("mmcv")):
        parser.error("--vs mmdet needs it: pip install 'saccade[mm]'")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console, size = Console(width=None if sys.stdout.isatty() else 130), tuple(args.size)
    torch.manual_seed(0)
    ours = build_ours(size)
    others = {"torchvision": lambda: build_torchvision(size), "mmdet": lambda: build_mmdet(ours)}
    models = {"saccade": ours} | {name: others[name]() for name in peers}
    rows = []
    for mode in args.modes:
        steps, cpu = {}, {name: [] for name in models}
        for name, model in models.items():
            make = mmdet_step_of if name == "mmdet" else step_of
            steps[name] = cpu_time_of(make(model.to(device), mode, size, device), cpu[name])
        console.print(f"[dim]timing {', '.join(steps)}, {mode}[/dim]")
        times = measure.interleaved(steps, args.runs, device)
        for name in models:
            own = cpu[name][-args.runs :]
            row = dict(model=name, mode=mode, size=list(size), seconds=statistics.median(times[name]))
            row |= dict(cpu_seconds=statistics.median(own), speedup=measure.ratio(times[name], times["saccade"]))
            row |= dict(cpu_speedup=measure.ratio(own, cpu["saccade"][-args.runs :]))
            rows.append(row)
    facts = measure.machine(device)
    table = Table(title=f"Mask R-CNN, ResNet-50, {size[0]}x{size[1]}: {facts['device']}, torch {facts['torch']}")
    for head in ("mode", "model", "seconds", "CPU seconds", "saccade's speed-up", "in CPU seconds"):
        table.add_column(head, justify="left" if head in ("mode", "model") else "right")
    for row in rows:
        figures = [f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['speedup']:.2f}×"]
        table.add_row(row["mode"], row["model"], *figures, f"{row['cpu_speedup']:.2f}×")
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = dict(torchvision=torchvision.__version__)
    if "mmdet" in models:
        versions |= dict(mmdet=sys.modules["mmdet"].__version__, mmcv=sys.modules["mmcv"].__version__)
    file = args.out / "benchmark_detectors.json"
    file.write_text(json.dumps(dict(machine=facts, versions=versions, runs=args.runs, rows=rows), indent=1) + "\n")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
