"""Probe a frozen backbone's features with a linear classifier or k-nearest neighbours.

The features are the inputs of the model's classifier (`forward_head(…, pre_logits=True)`), of images preprocessed as in
tests. The processes share the images.
"""

import inspect
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data.bad_images import BadImages
from .data.loader import EvaluationOrder, batches
from .models.build import create
from .models.build import probe as check_input_size
from .runtime.checkpoint import write_json
from .runtime.config import Count, NonNegativeInt, Positive, build, check, check_typed, load
from .runtime.distributed import all_reduce_sum, choose_device, rank, sync_errors, world_size
from .runtime.errors import UserError
from .runtime.log import format_metrics
from .runtime.precision import autocasting

Features = tuple[Tensor, Tensor]  # (N, C) float32 and labels (N,), on the CPU


class KNN:
    """Weighted k-nearest neighbours, by cosine: each of the k training images votes exp(cosine / temperature).

    As in Wu et al. 2018 (arXiv 1805.01978), with k and temperature of Caron et al. 2021 (arXiv 2104.14294). A class
    without votes is never predicted, not even in the top 5.
    """

    def __init__(self, k: Count = 20, temperature: Positive = 0.07):
        self.k, self.temperature = k, temperature

    def __call__(
        self, train: Features, val: Features, test: Features, num_classes: int, device: torch.device
    ) -> dict[str, Any]:
        """Return top1 and top5 on `test`, in percent; `val` is not used. Each process takes its share of the test."""
        if self.k > len(train[1]):
            message = f"probe.k={self.k} is more than the {len(train[1])} training images: make it smaller"
            raise UserError(message, quiet=rank() > 0)
        known, labels = nn.functional.normalize(train[0].to(device)), train[1].to(device)
        queries, targets = nn.functional.normalize(test[0][rank() :: world_size()]), test[1][rank() :: world_size()]
        correct = torch.zeros(2, dtype=torch.int64)
        for x, y in progress(list(zip(queries.split(256), targets.split(256))), "neighbours"):
            cosine, nearest = (x.to(device) @ known.T).topk(self.k)
            votes = torch.zeros(len(x), num_classes, device=device)
            votes.scatter_add_(1, labels[nearest], (cosine / self.temperature).exp())
            most, predicted = votes.topk(min(5, num_classes))
            hits = ((predicted == y[:, None].to(device)) & (most > 0)).cpu()
            correct += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
        top1, top5 = (100 * all_reduce_sum(correct).double() / len(test[1])).tolist()
        return dict(top1=top1, top5=top5, k=self.k, temperature=self.temperature)


class LogisticProbe:
    """scikit-learn's logistic regression on standardised features, with the C that is best on val.

    Unlike a layer trained by SGD, its result does not depend on a learning rate, epochs or processes, since the problem
    is convex. C: inverse regularization strengths to try; of equally good ones the smallest is chosen. iterations: at
    most, of L-BFGS; metrics.json has whether it converged. All features are in the memory of one process.
    """

    def __init__(self, C: tuple = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), iterations: Count = 1000):
        if not C or min(C) <= 0:
            raise UserError(f"probe.C={C} must be numbers above 0")
        self.C, self.iterations = sorted(C), iterations

    def __call__(
        self, train: Features, val: Features, test: Features, num_classes: int, device: torch.device
    ) -> dict[str, Any]:
        """Return top1 and top5 on `test` with the chosen C, and top1 on `val` with each, in percent; on process 0."""
        if rank() > 0:
            return {}
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(train[0].double().numpy())
        x, y = scaler.transform(train[0].double().numpy()), train[1].numpy()

        def top(model: LogisticRegression, features: Features, k: int) -> float:
            scores = torch.from_numpy(model.predict_proba(scaler.transform(features[0].double().numpy())))
            predicted = torch.from_numpy(model.classes_)[scores.topk(min(k, scores.shape[1])).indices]
            return 100 * (predicted == features[1][:, None]).any(1).double().mean().item()

        tried: list[tuple[float, float, LogisticRegression]] = []
        for strength in progress(self.C, "values of C"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it
                model = LogisticRegression(C=strength, max_iter=self.iterations).fit(x, y)
            tried.append((top(model, val, 1), strength, model))
        best, strength, model = max(tried, key=lambda one: one[0])
        return dict(
            top1=top(model, test, 1),
            top5=top(model, test, 5),
            C=strength,
            converged=bool((model.n_iter_ < self.iterations).all()),
            val_top1=best,
            val_top1_by_C={str(c): accuracy for accuracy, c, _ in tried},
        )


def run(
    out: Path,
    /,
    *,
    model: dict,
    data: dict,
    probe: dict,
    checkpoint: str | None = None,
    batch_size: Count = 64,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: NonNegativeInt = 0,
    device: str | None = None,
) -> None:
    """Fit `probe` on the train split's features, test it on the test split's, write out/metrics.json.

    model, data, checkpoint, precision, workers, device: as of saccade.train.engine.train. probe: `type` (KNN,
    LogisticProbe) and its arguments. batch_size: over all processes. Raises UserError for what the user can fix.
    """
    start_time = time.perf_counter()
    with sync_errors():
        target = choose_device(device)
        source, judge = build(data), build(probe)
        sizes = dict(num_classes=len(source.class_names), img_size=source.img_size)
        net = create(**sizes | model, checkpoint=checkpoint, new_head=True).to(target).eval()
        inputs = source.inputs(net.pretrained_cfg)
        check_input_size(net, inputs["input_size"])
        sets = {split: source.dataset(split, inputs) for split in ("train", "val", "test")}
    bad = BadImages(out / "bad_images.txt", source)
    with autocasting(target, precision)():
        splits = [
            features(net, images, inputs["input_size"], batch_size, workers, target, bad, name)
            for name, images in sets.items()
        ]
    bad.share()
    metrics = judge(*splits, len(source.class_names), target)
    if rank() == 0:
        metrics = {"images": len(splits[2][1]), **metrics, "seconds": round(time.perf_counter() - start_time, 3)}
        sizes = dict(train_images=len(splits[0][1]), features=splits[0][0].shape[1])
        write_json(out / "metrics.json", dict(probe=type(judge).__name__, **metrics, **sizes))
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        print(f"test: {metrics['images']} images {format_metrics(numbers)}\n  {out / 'metrics.json'}")
        if metrics.get("converged") is False:
            print("  the classifier has not converged: give more probe.iterations")


@torch.no_grad()
def features(
    model: nn.Module,
    images: Any,
    input_size: tuple[int, int, int],
    batch_size: int,
    workers: int,
    device: torch.device,
    bad: BadImages | None = None,
    name: str = "",
) -> Features:
    """Return the model's features of a dataset's images, in its order, the same in every process.

    bad: where images that can't be read are noted, which are left out; None: the first one raises. name: of the split,
    for the progress bar. Raises UserError where the features are not finite.
    """

    def pooled(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1).float().cpu()

    width = pooled(torch.zeros(1, *input_size, device=device)).shape[1]
    table, labels = torch.zeros(len(images), width), torch.zeros(len(images), dtype=torch.int64)
    order = EvaluationOrder(len(images), max(1, batch_size // world_size()))
    loader = batches(_Numbered(images), order, 0, workers, device, bad)
    for x, y, number in progress(loader, f"features of {name}"):
        table[number.cpu()], labels[number.cpu()] = pooled(x), y.cpu() + 1  # 0: not read
    for part in table.split(2**16):
        part.copy_(all_reduce_sum(part))  # a row is another process's, or zero, so that the sum is exact
    labels = all_reduce_sum(labels)
    if not table.isfinite().all():
        message = "the model's features are not finite numbers: use precision=fp32 or other weights"
        raise UserError(message, quiet=rank() > 0)
    return table[labels > 0], labels[labels > 0] - 1


def progress(items: Any, description: str) -> Iterable:
    """Yield the items, with a progress bar on a terminal and nothing elsewhere."""
    shown = rank() == 0 and sys.stdout.isatty()
    return track(items, description, total=len(items), disable=not shown, transient=True)


class _Numbered(Dataset):
    """A dataset of (image, label) with the image's index as a third part."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return *self.dataset[index], index


def validate(config: dict) -> None:
    """Check a config against what `run` takes; raises UserError for an unknown key, value or name.

    If the checkpoint is of a run, missing keys of the model section and data.img_size are set from that run.
    """
    _take_from_run(config)
    check("", config, run)
    check_typed("data", config["data"])
    check_typed("probe", config["probe"])
    for key in {"num_classes", "checkpoint", "new_head"} & config["model"].keys():
        raise UserError(f"model.{key} can't be set: classes come from the data, weights from checkpoint=FILE")
    if not config.get("checkpoint") and not config["model"].get("pretrained"):
        raise UserError(
            "checkpoint is missing: give the weights to judge with checkpoint=FILE, or model.pretrained=True"
        )
    if not isinstance(config["model"].get("name"), str):
        if config.get("checkpoint") and not Path(str(config["checkpoint"])).expanduser().exists():
            raise UserError(
                f"there is no checkpoint {config['checkpoint']}: give a file of weights or the folder of a finished run"
            )
        raise UserError("model.name is missing: give it with model.name=…, or a run's folder as checkpoint")


def _take_from_run(config: dict) -> None:
    """Complete a config with the model section and image size of the run that its checkpoint is from."""
    weights = Path(str(config.get("checkpoint")))
    folder = weights if weights.is_dir() else weights.parent
    file = next((f for f in (folder / "config.py", folder.parent / "config.py") if f.is_file()), None)
    inside = weights.is_dir() or weights.name == "model.safetensors" or weights.parent.name == "checkpoints"
    if not inside or file is None or not isinstance(config.get("model"), dict):
        return
    settings = load(file)
    theirs = {k: v for k, v in settings["model"].items() if k not in ("pretrained", "pretrained_cfg_overlay")}
    if config["model"].get("name", theirs.get("name")) != theirs.get("name"):
        return  # another model is requested: loading will check the checkpoint against it
    config["model"] = theirs | config["model"]
    accepted = inspect.signature(config["data"]["type"]).parameters if isinstance(config["data"], dict) else {}
    size = settings["data"].get("img_size")
    if "img_size" in accepted and config["data"].get("img_size") is None and size is not None:
        config["data"]["img_size"] = size
