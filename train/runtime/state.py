"""What changes while a model trains, and its way into a checkpoint and back."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import checkpoint
from .distributed import all_reduce_sum, broadcast_buffers, full_tensor, rank, shard_tensor, world_size
from .errors import UserError

REMEDIES = "try a smaller optimizer.lr, more schedule.warmup_epochs, clip_grad=1.0 or precision=fp32"


class State:
    """Weights, averaged weights, optimiser and scaler; step, steps not yet logged, and the best evaluation.

    step: steps done. evaluated: the step of the last evaluation. best: None, or step, weights ("model" or "ema"),
    score and metrics of the best evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: str,
        class_names: Sequence[str] = (),
    ):
        self.model, self.ema, self.optimizer, self.scaler, self.config = model, ema, optimizer, scaler, config
        self.class_names = list(class_names)  # of the model's outputs, in order
        self.step, self.evaluated = 0, 0
        self.best: dict[str, Any] | None = None
        self._names: list[str] = []
        self._window: list[Tensor] = []  # a vector of values for each step since the last log line

    def note(self, values: dict[str, Tensor]) -> None:
        """Remember a step's values (scalar tensors of this process), averaged over the processes."""
        self._names = list(values)
        self._window.append(all_reduce_sum(torch.stack(list(values.values())).float()) / world_size())

    def take_means(self) -> dict[str, float]:
        """The mean of what was noted since the last call. Raises UserError where a loss was not finite."""
        self.check_finite()
        means = torch.stack(self._window).double().mean(0).tolist()
        self._window = []
        return dict(zip(self._names, means))

    def check_finite(self) -> None:
        """Raise UserError where a loss noted since the last log line is not a finite number."""
        if not self._window:
            return
        losses = torch.stack(self._window)[:, self._names.index("loss")].tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {self.step - len(losses) + i + 1}: {REMEDIES}")

    def evaluate(self, function: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        """`function`'s metrics of the weights and, with "ema_" before their names, of the averaged weights."""
        broadcast_buffers(self.model)
        metrics = function(self.model)
        if self.ema is not None:
            broadcast_buffers(self.ema.module)
            metrics |= {f"ema_{k}": v for k, v in function(self.ema.module).items() if k != "images"}
        return metrics

    def judge(self, metrics: dict[str, float], score: Callable[[dict[str, float]], float]) -> bool:
        """Note an evaluation at this step; whether it is the best so far, the later of equals."""
        self.evaluated = self.step
        candidates = {"model": {k: v for k, v in metrics.items() if not k.startswith("ema_")}}
        if self.ema is not None:
            candidates["ema"] = {k.removeprefix("ema_"): v for k, v in metrics.items() if k.startswith("ema_")}
        weights = max(candidates, key=lambda kind: score(candidates[kind]))
        found = dict(step=self.step, weights=weights, score=score(candidates[weights]), metrics=candidates[weights])
        if self.best is not None and found["score"] < self.best["score"]:
            return False
        self.best = found
        return True

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors and what JSON can say. All processes must call it; process 0 gets it all.

        Raises UserError where the weights are not finite.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        moments, optimizer = checkpoint.optimizer_state(self.optimizer, self.model)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        kept = {}
        for name, tensor in tensors.items():  # one after the other: no GPU need hold all that is divided
            tensor = full_tensor(tensor)
            if name.startswith("model.") and tensor.is_floating_point() and not tensor.isfinite().all():
                name = name.removeprefix("model.")
                raise UserError(f"{name} is not finite after step {self.step}, so it is not saved: {REMEDIES}")
            if rank() == 0:
                kept[name] = tensor.detach().cpu()
        if self._window:
            kept["window"] = torch.stack(self._window)
        meta = dict(
            step=self.step,
            evaluated=self.evaluated,
            best=self.best,
            names=self._names,
            optimizer=optimizer,
            scaler=self.scaler.state_dict(),
            config=self.config,
            class_names=self.class_names,
        )
        return kept, meta

    def load(self, folder: Path, device: torch.device) -> list[str]:
        """Go on from the newest whole checkpoint in a folder, if there is one; returns what to say of it."""
        found = checkpoint.load(folder)
        if found is None:
            return ["nothing saved yet: starting from the beginning"]
        tensors, meta, said = found
        if meta.get("class_names", self.class_names) != self.class_names:
            raise UserError(
                f"the data's classes have changed since the checkpoint in {folder}: they were "
                f"{_few(meta['class_names'])} and are {_few(self.class_names)}; give the data as they were, or train "
                "a new run from its weights with checkpoint=…"
            )
        try:
            _load(self.model, _part(tensors, "model."))
            if self.ema is not None:
                _load(self.ema.module, _part(tensors, "ema."))
            checkpoint.load_optimizer_state(self.optimizer, self.model, _part(tensors, "optimizer."), meta["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {folder} is of another model or optimiser than this configuration's: "
                "resume with the configuration it was trained with, or start again with --overwrite"
            ) from error
        self.scaler.load_state_dict(meta["scaler"])
        self.step, self.evaluated, self.best, self._names = (
            meta[key] for key in ("step", "evaluated", "best", "names")
        )
        self._window = [values.to(device) for values in tensors.get("window", ())]
        changed = [line for line in self.config.splitlines() if line not in meta["config"].splitlines()]
        said += [f"configuration changed since the checkpoint: {line}" for line in changed]
        return [*said, f"going on after step {self.step}"]


def best_weights(folder: Path) -> dict[str, Tensor]:
    """The best weights that were saved in a folder; raises UserError where the file can't be read."""
    try:
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
