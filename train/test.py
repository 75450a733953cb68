"""A test of a trained model: on a split of the data or, of a classifier, on a further folder of images."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from .data.bad_images import BadImages
from .data.loader import EvaluationOrder, batches
from .data.test_folder import TestFolder
from .engine import autocasting, evaluate, where
from .metrics.real import Accepted
from .metrics.speed import Speed
from .runtime.checkpoint import write_text
from .runtime.config import build
from .runtime.distributed import choose_device, rank, sync_errors, world_size
from .runtime.errors import UserError
from .runtime.log import format_metrics
from .tasks.classify import Classify


def test(
    run_dir: Path | None,
    config: dict,
    checkpoint: Path | None,
    split: str,
    out: Path,
    real: str | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> None:
    """Evaluate a model on a split, write out/metrics.json (top1, top5 in percent, images, seconds, …), and draw.

    run_dir: of a finished run, whose exported model is taken unless a checkpoint is given; or None, with a checkpoint,
    or with model.pretrained for the weights that timm publishes.
    config: the run's, or any that `train` takes; its data may be a TestFolder.
    real: a file of further labels that are accepted; see saccade.train.metrics.real. preprocessing: what replaces the
    data's or the model's own, as timm names it (crop_pct, interpolation).
    Raises UserError for what the user can mend.
    """
    with sync_errors():
        place = choose_device(config.get("device"))
        source = build(config["data"])
        job = build(config["task"], source)
        if (real or isinstance(source, TestFolder)) and not isinstance(job, Classify):
            raise UserError("--images and --real are for classifiers: test on a split of the data")
        classes = dict(num_classes=source.of_model) if isinstance(source, TestFolder) else {}
        if checkpoint is not None:
            net = job.model(**config["model"], **classes, checkpoint=checkpoint)
        elif run_dir is not None:
            net = job.restore(run_dir, config["model"], **classes)
        else:
            net = job.published(config["model"], **classes)
        net = net.to(place)
        inputs = source.inputs(net.pretrained_cfg) | (preprocessing or {})
        job.probe(net, inputs)
        if classes and len(job.class_names) < net.num_classes:
            kept = torch.tensor(source.classes, device=place)
            net.register_forward_hook(lambda module, images, logits: logits[:, kept])
        dataset = source.dataset(split, inputs)
        seen = dataset if real is None else Accepted(dataset, real, len(job.class_names))
        out.mkdir(parents=True, exist_ok=True)
    order = EvaluationOrder(len(dataset), max(1, config["batch_size"] // world_size()))
    bad = BadImages(out / f"bad_images_{split}.txt", source)
    loader = batches(seen, order, 0, config.get("workers", 0), place, bad)
    precision = config.get("precision", "fp32")
    speed, began = Speed(net, place), time.perf_counter()
    metrics, detail = evaluate(net, job, loader, autocasting(place, precision))
    bad.share()
    metrics |= dict(seconds=round(time.perf_counter() - began, 3), **speed.result())
    tested_on = source.root if isinstance(source, TestFolder) else split
    said: list[str] = []
    with sync_errors():
        if rank() == 0:
            beside, said = job.report(out, detail)
            kept = ("input_size", "crop_pct", "interpolation")
            how = {key: inputs[key] for key in kept if key in inputs} | dict(precision=precision)
            whole = dict(split=tested_on, **metrics, **how, **beside)
            write_text(out / "metrics.json", json.dumps(whole, indent=2) + "\n")
    if rank() == 0:
        job.pictures(out, net, dataset, detail)
        print("\n".join([f"{tested_on}: {metrics['images']} images {format_metrics(metrics)}", *said]))
        print(
            where(
                run_dir or out, [out / "metrics.json", *sorted(out.glob("*.csv")), *sorted(out.glob("pictures/*.png"))]
            )
        )
