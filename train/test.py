"""Test a trained model: on a split of the data or, of a classifier, on another folder of images."""

import copy
import time
from pathlib import Path
from typing import Any

from torch import nn

from .data.bad_images import BadImages
from .data.loader import EvaluationOrder, batches
from .data.test_folder import TestFolder
from .engine import evaluate, list_outputs
from .metrics.real import Accepted
from .metrics.speed import Speed
from .models.class_names import match_classes, read_class_names, rename_classes
from .models.published import read_published
from .models.weights import Weights
from .runtime.checkpoint import write_json
from .runtime.config import build
from .runtime.distributed import choose_device, rank, sync_errors, world_size
from .runtime.errors import UserError
from .runtime.log import format_metrics
from .runtime.precision import autocasting
from .tasks.classify import Classify
from .tasks.task import Task


def test(
    run_dir: Path | None,
    config: dict,
    checkpoint: Path | Weights | None,
    split: str,
    out: Path,
    real: str | None = None,
    preprocessing: dict[str, Any] | None = None,
    class_map: dict[str, str] | None = None,
    as_json: bool = False,
) -> None:
    """Evaluate a model on a split, write out/metrics.json (top1, top5 in percent, images, seconds, …), and draw.

    run_dir: of a finished run, whose exported model is taken unless a checkpoint is given; or None, with a checkpoint,
    or with model.pretrained for the weights that timm publishes.
    config: the run's, or any that `train` takes; its data may be a TestFolder.
    real: a file of further labels that are accepted; see saccade.train.metrics.real. preprocessing: what replaces the
    data's or the model's own, as timm names it (crop_pct, interpolation). class_map: {class of the data: class of the
    model}, of those that have different names. as_json: print metrics.json instead of lines for people.
    Raises UserError for what the user can fix.
    """
    with sync_errors():
        device = choose_device(config.get("device"))
        checkpoint = None if checkpoint is None else read_published(checkpoint)  # read once for all uses
        source = build(config["data"])
        task = build(config["task"], source)
        if (real or isinstance(source, TestFolder)) and not isinstance(task, Classify):
            raise UserError("--images and --real are for classifiers: test on a split of the data")
        if isinstance(source, TestFolder):
            names, subset = source.model_classes, True
        else:
            names, subset = model_class_names(task, run_dir, config, checkpoint, class_map), class_map is not None
        net, indices = load_model(task, run_dir, config, checkpoint, source, names, subset)
        net = net.to(device)
        inputs = source.inputs(net.pretrained_cfg) | (preprocessing or {})
        task.probe(net, inputs)
        if names is not None and indices != list(range(len(names))):
            task.select_classes(net, indices)
        dataset = source.dataset(split, inputs)
        tested = dataset if real is None else Accepted(dataset, real, len(task.class_names))
        out.mkdir(parents=True, exist_ok=True)
    sequences = getattr(dataset, "sequences", None)
    order = EvaluationOrder(len(dataset), max(1, config["batch_size"] // world_size()), sequences)
    bad = BadImages(out / f"bad_images_{split}.txt", source)
    loader = batches(tested, order, 0, config.get("workers", 0), device, bad)
    precision = config.get("precision", "fp32")
    speed, start_time = Speed(net, device), time.perf_counter()
    metrics, detail = evaluate(net, task, loader, autocasting(device, precision))
    bad.share()
    metrics |= dict(seconds=round(time.perf_counter() - start_time, 3), **speed.result())
    tested_on = source.root if isinstance(source, TestFolder) else split
    lines: list[str] = []
    with sync_errors():
        if rank() == 0:
            entries, lines = task.report(out, detail)
            keys = ("input_size", "crop_pct", "interpolation")
            settings = {key: inputs[key] for key in keys if key in inputs} | dict(precision=precision)
            write_json(out / "metrics.json", dict(split=tested_on, **metrics, **settings, **entries))
    if rank() == 0:
        task.draw_results(out, net, dataset, detail)
        if sorted(indices) == list(range(len(indices))) and indices != sorted(indices):
            lines = ["the data have the model's classes in another order: they are matched by name", *lines]
        if as_json:
            print((out / "metrics.json").read_text(encoding="utf-8").strip())
            return
        print("\n".join([f"{tested_on}: {metrics['images']} images {format_metrics(metrics)}", *lines]))
        files = [out / "metrics.json", *sorted(out.glob("*.csv")), *sorted(out.glob("pictures/*.png"))]
        print(list_outputs(run_dir or out, files))


def model_class_names(
    task: Task | None,
    run_dir: Path | None,
    config: dict,
    checkpoint: Path | Weights | None,
    class_map: dict[str, str] | None,
) -> list[str] | None:
    """Return the classes of the model that `test` will load, under the data's names; None if they are not recorded.

    task: knows the classes of published weights; None: these are not looked up.
    """
    weights = checkpoint or run_dir
    if weights is not None:
        names = read_class_names(weights)
    else:
        names = task.published_class_names(config["model"]) if task is not None else None
    if class_map is None:
        return names
    if names is None:
        raise UserError("--class-map needs a model whose classes are named: a run's, or a checkpoint of a run")
    return rename_classes(names, class_map)


def load_model(
    task: Task,
    run_dir: Path | None,
    config: dict,
    checkpoint: Path | Weights | None,
    source: Any,
    names: list[str] | None,
    subset: bool,
) -> tuple[nn.Module, list[int]]:
    """Return the model that `test` was asked for, and which of its classes those of the data are.

    names: the model's classes, or None where they are not known: then they must be as many as the data's.
    subset: whether the data may have some of them only.
    """
    indices = list(range(len(task.class_names)))
    if names is not None and not getattr(source, "numbered", False):
        indices = match_classes(task.class_names, names, subset)
        task = copy.copy(task)
        task.class_names = names  # the model is built with its own classes
    if checkpoint is not None:
        return task.model(**config["model"], checkpoint=checkpoint), indices
    if run_dir is not None:
        return task.restore(run_dir, config["model"]), indices
    return task.published(config["model"]), indices
