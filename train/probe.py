"""How good a frozen backbone's features are: a linear classifier on them, or their nearest neighbours.

The features are what the model's own head gives its classifier (`forward_head(…, pre_logits=True)`), of images as in
tests. All processes compute them, each image once.
"""

import json
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data.bad_images import BadImages
from .data.loader import EvaluationOrder, batches
from .engine import autocasting
from .models.build import create
from .models.build import probe as show
from .runtime.checkpoint import write_text
from .runtime.config import build, check, check_typed
from .runtime.distributed import all_reduce_sum, choose_device, rank, sync_errors, world_size
from .runtime.errors import UserError
from .runtime.log import format_metrics

Features = tuple[Tensor, Tensor]  # (N, C) float32 and labels (N,), on the CPU


class KNN:
    """Weighted k-nearest neighbours, by cosine: each of the k training images votes exp(cosine / temperature).

    As in Wu et al. 2018 (arXiv 1805.01978), with k and temperature of Caron et al. 2021 (arXiv 2104.14294). A class
    without a vote is no prediction, also not among five.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07):
        if k < 1 or temperature <= 0:
            raise UserError(f"probe.k={k} must be 1 or more, and probe.temperature={temperature} more than 0")
        self.k, self.temperature = k, temperature

    def __call__(self, train: Features, val: Features, test: Features, classes: int, place: torch.device) -> dict:
        """top1 and top5 on `test`, in percent; `val` plays no part. Every process takes its share of the test."""
        if self.k > len(train[1]):
            said = f"probe.k={self.k} is more than the {len(train[1])} training images: make it smaller"
            raise UserError(said, quiet=rank() > 0)
        known, labels = nn.functional.normalize(train[0].to(place)), train[1].to(place)
        asked, answers = nn.functional.normalize(test[0][rank() :: world_size()]), test[1][rank() :: world_size()]
        right = torch.zeros(2, dtype=torch.int64)
        for x, y in zip(asked.split(256), answers.split(256)):
            cosine, nearest = (x.to(place) @ known.T).topk(self.k)
            votes = torch.zeros(len(x), classes, device=place)
            votes.scatter_add_(1, labels[nearest], (cosine / self.temperature).exp())
            most, said = votes.topk(min(5, classes))
            hits = ((said == y[:, None].to(place)) & (most > 0)).cpu()
            right += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
        top1, top5 = (100 * all_reduce_sum(right).double() / len(test[1])).tolist()
        return dict(top1=top1, top5=top5, k=self.k, temperature=self.temperature)


class LogisticProbe:
    """Logistic regression on standardised features (scikit-learn's), its C the one that does best on val.

    Rather than a layer trained by SGD: the problem is convex, so that there is one answer, of no learning rate, number
    of epochs or processes. C: inverse strengths of the penalty to try, the smaller of equals being taken. iterations:
    of L-BFGS for each, at most; metrics.json says whether it converged. All features are in the memory of one process.
    """

    def __init__(self, C: tuple = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), iterations: int = 1000):
        if not C or min(C) <= 0 or iterations < 1:
            raise UserError(f"probe.C={C} must be numbers above 0, and probe.iterations={iterations} 1 or more")
        self.C, self.iterations = sorted(C), iterations

    def __call__(self, train: Features, val: Features, test: Features, classes: int, place: torch.device) -> dict:
        """top1 and top5 on `test` with the chosen C, and top1 on `val` with each, in percent; of process 0 alone."""
        if rank() > 0:
            return {}
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(train[0].double().numpy())
        x, y = scaler.transform(train[0].double().numpy()), train[1].numpy()

        def top(model: LogisticRegression, features: Features, k: int) -> float:
            scores = torch.from_numpy(model.predict_proba(scaler.transform(features[0].double().numpy())))
            said = torch.from_numpy(model.classes_)[scores.topk(min(k, scores.shape[1])).indices]
            return 100 * (said == features[1][:, None]).any(1).double().mean().item()

        tried: list[tuple[float, float, LogisticRegression]] = []
        for strength in self.C:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it
                model = LogisticRegression(C=strength, max_iter=self.iterations).fit(x, y)
            tried.append((top(model, val, 1), strength, model))
        best, strength, model = max(tried, key=lambda found: found[0])
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
    batch_size: int = 64,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int = 0,
    device: str | None = None,
) -> None:
    """Fit `probe` on the train split's features, test it on the test split's, write out/metrics.json.

    model, data, checkpoint, precision, workers, device: as of saccade.train.engine.train. probe: `type` (KNN,
    LogisticProbe) and its arguments. batch_size: over all processes. Raises UserError for what the user can mend.
    """
    began = time.perf_counter()
    with sync_errors():
        place = choose_device(device)
        source, judge = build(data), build(probe)
        sizes = dict(num_classes=len(source.class_names), img_size=source.img_size)
        net = create(**sizes | model, checkpoint=checkpoint, new_head=True).to(place).eval()
        inputs = source.inputs(net.pretrained_cfg)
        show(net, inputs["input_size"])
        sets = {split: source.dataset(split, inputs) for split in ("train", "val", "test")}
    bad = BadImages(out / "bad_images.txt", source)
    with autocasting(place, precision)():
        found = [features(net, each, inputs["input_size"], batch_size, workers, place, bad) for each in sets.values()]
    bad.share()
    metrics = judge(*found, len(source.class_names), place)
    if rank() == 0:
        metrics = {"images": len(found[2][1]), **metrics, "seconds": round(time.perf_counter() - began, 3)}
        said = dict(probe=type(judge).__name__, **metrics, train_images=len(found[0][1]), features=found[0][0].shape[1])
        write_text(out / "metrics.json", json.dumps(said, indent=2) + "\n")
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
    place: torch.device,
    bad: BadImages | None = None,
) -> Features:
    """The model's features of a dataset's images, in its order, the same in every process.

    bad: where images that can't be read are noted, which are left out; None: the first one raises. Raises UserError
    where the features are not finite.
    """

    def pooled(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1).float().cpu()

    width = pooled(torch.zeros(1, *input_size, device=place)).shape[1]
    found, labels = torch.zeros(len(images), width), torch.zeros(len(images), dtype=torch.int64)
    order = EvaluationOrder(len(images), max(1, batch_size // world_size()))
    for x, y, number in batches(_Numbered(images), order, 0, workers, place, bad):
        found[number.cpu()], labels[number.cpu()] = pooled(x), y.cpu() + 1  # 0: not read
    for part in found.split(2**16):
        part.copy_(all_reduce_sum(part))  # a row is another process's, or zero, so that the sum is exact
    labels = all_reduce_sum(labels)
    if not found.isfinite().all():
        said = "the model's features are not finite numbers: use precision=fp32 or other weights"
        raise UserError(said, quiet=rank() > 0)
    return found[labels > 0], labels[labels > 0] - 1


class _Numbered(Dataset):
    """A dataset of (image, label) with the image's number as a third."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return *self.dataset[index], index


def validate(config: dict) -> None:
    """Hold a config to what `run` takes; raises UserError for a key, a value or a name that is not known."""
    check("", config, run)
    check_typed("data", config["data"])
    check_typed("probe", config["probe"])
    for key in {"num_classes", "checkpoint", "new_head"} & config["model"].keys():
        raise UserError(f"model.{key} can't be set: classes come from the data, weights from checkpoint=…")
    if not isinstance(config["model"].get("name"), str):
        raise UserError("model.name is missing: set it in the config or with model.name=… on the command line")
    if not config.get("checkpoint") and not config["model"].get("pretrained"):
        raise UserError(
            "checkpoint is missing: give the weights to judge with checkpoint=FILE, or model.pretrained=True"
        )
    if config.get("batch_size", 1) < 1:
        raise UserError(f"batch_size={config['batch_size']} must be 1 or more")
