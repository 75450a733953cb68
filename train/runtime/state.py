"""The state of training that changes from step to step, and how it is saved and loaded."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import checkpoint, sharded
from .config import flatten
from .distributed import broadcast_buffers, full_tensor, local_tensor, rank, shard_tensor
from .errors import UserError

REMEDIES = "try a smaller optimizer.lr, more schedule.warmup_epochs, clip_grad=1.0 or precision=fp32"

# Keys of a config that a resumed run can't change, and why; docs/train.md lists the others.
FIXED = {
    "model.name": "the checkpoint holds another model",
    "model.pretrained": "the weights come from the run's checkpoint",
    "checkpoint": "the weights come from the run's checkpoint",
    "task.type": "the checkpoint is of another task",
    "optimizer.opt": "the checkpoint holds another optimizer's state",
    "batch_size": "steps and epochs are counted in batches of the size that the run began with",
}


class State:
    """Weights, averaged weights, optimizer and scaler; step, steps not yet logged, and the best evaluation.

    step: steps done. evaluated: the step of the last evaluation. best: None, or step, weights ("model" or "ema"),
    rank, score and metrics of the best evaluation. skipped, skipped_in_row: steps without an update, whose loss or
    gradients were not finite, in all and in a row up to now (saccade.train.runtime.numbers).
    """

    def __init__(
        self,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: str,
        class_names: Sequence[str] = (),
        images: int = 0,
        order: str = "stored",
    ):
        self.model, self.ema, self.optimizer, self.scaler, self.config = model, ema, optimizer, scaler, config
        self.class_names = list(class_names)  # of the model's outputs, in order
        self.images, self.order = images, order  # of the training split; how the order of an epoch is computed
        self.step, self.evaluated, self.skipped, self.skipped_in_row = 0, 0, 0, 0
        self.best: dict[str, Any] | None = None
        self._names: list[str] = []
        self._window: list[Tensor] = []  # a vector of values for each step since the last log line

    def note(self, values: dict[str, Tensor]) -> None:
        """Record a step's values (scalar tensors, averaged over the processes)."""
        self._names = list(values)
        self._window.append(torch.stack(list(values.values())))

    def take_means(self) -> dict[str, float]:
        """Return the means of the values recorded since the last call; NaN where every step since was skipped."""
        if not self._window:
            return dict.fromkeys(self._names or ["loss"], math.nan)
        means = torch.stack(self._window).double().mean(0).tolist()
        self._window = []
        return dict(zip(self._names, means))

    def evaluate(self, function: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        """Return `function`'s metrics of the weights and, prefixed with "ema_", of the averaged weights."""
        broadcast_buffers(self.model)
        metrics = function(self.model)
        if self.ema is not None:
            broadcast_buffers(self.ema.module)
            metrics |= {f"ema_{k}": v for k, v in function(self.ema.module).items() if k != "images"}
        return metrics

    def judge(self, metrics: dict[str, float], score: Callable[[dict[str, float]], float]) -> bool:
        """Record an evaluation at this step; return whether it is the best so far, the later of equals.

        An evaluation whose score is undefined (NaN: val without objects, say) ranks below those with a score, by the
        lowest val loss; without one, the latest is the best.
        """
        self.evaluated = self.step
        candidates = {"model": {k: v for k, v in metrics.items() if not k.startswith("ema_")}}
        if self.ema is not None:
            candidates["ema"] = {k.removeprefix("ema_"): v for k, v in metrics.items() if k.startswith("ema_")}
        ranks = {kind: _rank(values, score(values)) for kind, values in candidates.items()}
        weights = max(ranks, key=lambda kind: ranks[kind])
        if self.best is not None and ranks[weights] < self.best["rank"]:
            return False
        values = candidates[weights]
        self.best = dict(step=self.step, weights=weights, rank=ranks[weights])
        self.best |= dict(score=_finite(score(values)), metrics={k: _finite(v) for k, v in values.items()})
        return True

    def has_stalled(self, patience: int | None, eval_steps: int) -> bool:
        """Return whether the last `patience` evaluations, the last at this step, were not better than one before."""
        if patience is None or self.best is None or self.evaluated != self.step:
            return False
        return self.evaluated - self.best["step"] >= patience * eval_steps

    def content(self, gather: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a checkpoint's tensors and metadata. All processes must call it; process 0 gets all tensors.

        gather: gather sharded tensors in process 0; otherwise each process gets its shards. Raises UserError where the
        weights are not finite.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        moments, optimizer = checkpoint.optimizer_state(self.optimizer, self.model)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        kept = {}
        for name, tensor in tensors.items():  # one after the other: no GPU need hold all full tensors
            tensor = full_tensor(tensor) if gather else tensor
            if name.startswith("model.") and tensor.is_floating_point() and not local_tensor(tensor).isfinite().all():
                name = name.removeprefix("model.")
                raise UserError(f"{name} is not finite after step {self.step}, so it is not saved: {REMEDIES}")
            if not gather:
                kept[name] = tensor.detach()
            elif rank() == 0:
                kept[name] = tensor.detach().cpu()
        if self._window:
            kept["window"] = torch.stack(self._window)
        meta = dict(
            step=self.step,
            evaluated=self.evaluated,
            skipped=[self.skipped, self.skipped_in_row],
            best=self.best,
            names=self._names,
            optimizer=optimizer,
            scaler=self.scaler.state_dict(),
            config=self.config,
            class_names=self.class_names,
            images=self.images,
            order=self.order,
        )
        return kept, meta

    def _like(self, name: str) -> Tensor | None:
        """Return the tensor whose sharding an entry of a checkpoint has."""
        kind, _, rest = name.partition(".")
        if kind in ("model", "ema"):
            model = self.model if kind == "model" else self.ema and self.ema.module
            return model.state_dict().get(rest) if model is not None else None
        return dict(self.model.named_parameters()).get(rest.removeprefix("state.").rpartition(".")[0])

    def load(self, folder: Path, device: torch.device, steps: int) -> list[str]:
        """Resume from the newest intact checkpoint in a folder, if there is one; return messages about it.

        steps: of the whole run. Raises UserError for a checkpoint of another model, optimizer or data, for a change of
        the config that can't take effect, and where the run is past its end.
        """
        loaded = sharded.load(folder, self._like) or checkpoint.load(folder)
        if loaded is None:
            return ["nothing saved yet: starting from the beginning"]
        tensors, meta, messages = loaded
        if meta.get("class_names", self.class_names) != self.class_names:
            raise UserError(
                f"the data's classes have changed since the checkpoint in {folder}: they were "
                f"{_few(meta['class_names'])} and are {_few(self.class_names)}; give the data as they were, or train "
                "a new run from its weights with checkpoint=FILE"
            )
        messages += changes(meta["config"], self.config)
        if (images := meta.get("images", self.images)) != self.images:
            messages.append(
                f"changed since the checkpoint: {self.images} training images, {images} before: the images of an epoch "
                "are in another order, and steps and epochs are counted by the new number"
            )
        elif meta.get("order", "stored") != self.order:
            raise UserError(
                f"the checkpoint in {folder} is of a version of saccade that orders the {images} images of an epoch "
                "otherwise: resume with that version, or train a new run from its weights with checkpoint=FILE"
            )
        if meta["step"] > steps:
            raise UserError(
                f"the run has done {meta['step']} steps, and this configuration ends after {steps}: give more epochs "
                "(or iterations), or start again with --overwrite"
            )
        try:
            _load(self.model, _part(tensors, "model."))
            if self.ema is not None and (averaged := _part(tensors, "ema.")):
                _load(self.ema.module, averaged)
            elif self.ema is not None:
                self.ema.set(self.model)
                messages.append("the checkpoint has no averaged weights: averaging begins with its weights")
            checkpoint.load_optimizer_state(self.optimizer, self.model, _part(tensors, "optimizer."), meta["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {folder} is of another model or optimizer than this configuration's: "
                "resume with the configuration it was trained with, or start again with --overwrite"
            ) from error
        if self.scaler.is_enabled() and meta["scaler"]:
            self.scaler.load_state_dict(meta["scaler"])
        self.step, self.evaluated, self.best, self._names = (
            meta[key] for key in ("step", "evaluated", "best", "names")
        )
        self.skipped, self.skipped_in_row = meta.get("skipped", (0, 0))
        if self.best is not None:
            self.best.setdefault("rank", [1, self.best["score"]])
        self._window = [values.to(device) for values in tensors.get("window", ())]
        return [*messages, f"resuming after step {self.step}"]


def changes(old: str, new: str) -> list[str]:
    """Return a message for each key in which two dumped configs differ; raise UserError for one that can't change."""
    before, after = flatten(old), flatten(new)
    messages = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        was, now = before.get(key, "not set"), after.get(key, "not set")
        if key in FIXED and not {was, now} <= {"not set", "None", "False"}:
            raise UserError(
                f"{key} can't change on --resume (it was {was} and is {now}): {FIXED[key]}; give it as it was, or "
                "train a new run from this one's weights with checkpoint=FILE"
            )
        messages.append(f"changed since the checkpoint: {key}: {was} -> {now}")
    return messages


def _rank(metrics: dict[str, float], score: float) -> list[float]:
    """Return what evaluations are compared by: those with a score first, then those with a loss."""
    if math.isfinite(score):
        return [1, score]
    loss = metrics.get("loss", math.nan)
    return [0, -loss] if math.isfinite(loss) else [-1, 0]


def _finite(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def best_weights(folder: Path) -> dict[str, Tensor]:
    """Return the best weights saved in a folder. Raises UserError where the file can't be read."""
    try:
        if sharded.newest_step(folder, (sharded.BEST,)) > checkpoint.step(folder / checkpoint.BEST):
            tensors, meta = sharded.read(folder / sharded.BEST, alone=True, only=("model.", "ema."))
        else:
            tensors, meta = checkpoint.read(folder / checkpoint.BEST)
    except checkpoint.Unreadable as error:
        raise UserError(f"{error}: train again with --overwrite") from error
    return _part(tensors, f"{meta['best']['weights']}.")


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["…"] if len(names) > 5 else [])])


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({name: shard_tensor(tensor, own.get(name, tensor)) for name, tensor in tensors.items()})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
