"""Losses and gradients that are not finite: the step is skipped, explained and counted. Spikes of loss are reported.

A step is skipped by all processes where the loss or a gradient is NaN or infinite in any of them: weights, buffers,
averaged weights and the optimizer stay as they were. It counts as a step, so that the order of images and the learning
rate, which are functions of the step, do not depend on it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .distributed import all_gather_object, all_reduce_sum, local_tensor, rank, world_size
from .errors import NUMBERS, UserError
from .state import REMEDIES, State

MIN_SCALE = 1.0  # of fp16's loss: below it, gradients are made smaller than they are
RECENT, ENOUGH = 100, 20  # losses that a spike is compared with: at most, and at least
SHOWN = 8  # images that a warning names on the terminal; log.txt names all


class Part(NamedTuple):
    """What one process found about one part of a skipped step."""

    rank: int
    images: list[str]
    module: str | None  # the first whose output was not finite, of the kind that `explain` names
    narrowed: bool  # whether `images` are those of which the output was not finite, not the whole batch
    position: int = 0  # of the module among those of the forward pass


class Numbers:
    """Decides over all processes whether a step's loss and gradients are used.

    state: of the run; its model's gradients and buffers are watched, and its `skipped` and `skipped_in_row` counted.
    max_skipped: steps in a row with which the run ends. loss_spike: a loss of more than this many times the median of
    those before is reported; None: never. message(text, show=, keep=): writes to the terminal and to log.txt.
    """

    def __init__(self, state: State, max_skipped: int, loss_spike: float | None, message: Callable[..., None]):
        self.state, self.max_skipped, self.loss_spike, self.message = state, max_skipped, loss_spike, message
        self.model, self.scaler = state.model, state.scaler
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._spiking = False
        self.flags: list[float] = []  # of the last step

    def begin(self) -> None:
        """Keep the buffers as they are, before a step's first forward pass."""
        self._buffers = copy_buffers(self.model)

    def accept(
        self, values: dict[str, Tensor], explain: Callable[[], list[Part]], flags: Sequence[float] = ()
    ) -> dict[str, Tensor] | None:
        """Return a step's values ("loss" and others, scalars), averaged over the processes; None to skip the step.

        The gradients must be complete; they are unscaled here. explain: called in all processes where the step is
        skipped; returns what `examine` found of each part. flags: other numbers that the same message carries; their
        sums over the processes are in `self.flags`. Raises UserError, code 70, with the last step allowed.
        """
        step = self.state.step + 1
        self.scaler.unscale_(self.state.optimizer)
        gradients = [local_tensor(p.grad) for p in self.model.parameters() if p.grad is not None]
        largest = get_total_norm(gradients, math.inf) if gradients else torch.zeros(())
        own = [each.to(largest.device, torch.float32) for each in (*values.values(), ~largest.isfinite())]
        sums = all_reduce_sum(torch.cat([torch.stack(own), torch.tensor(flags, device=largest.device)]))
        means = sums[: len(own)].div_(world_size())
        shown = [list(values).index("loss"), len(values), *range(len(own), len(sums))]
        loss, overflow, *self.flags = sums[shown].tolist()
        if math.isfinite(loss) and not overflow:
            self._watch(step, loss)
            self.state.skipped_in_row = 0
            return dict(zip(values, means))
        restore_buffers(self._buffers)
        if math.isfinite(loss) and self._lower_scale():
            return None
        self.scaler.update(self.scaler.get_scale())
        self.state.skipped, self.state.skipped_in_row = self.state.skipped + 1, self.state.skipped_in_row + 1
        reason = f"the loss is {loss}" if not math.isfinite(loss) else self._gradient()
        self._warn(step, reason, explain())
        if self.state.skipped_in_row >= self.max_skipped:
            raise UserError(
                f"{self.state.skipped_in_row} steps in a row had a loss or gradients that are not finite, as many as "
                f"max_skipped allows (step {step}: {reason}): {REMEDIES}; the checkpoints are of earlier steps",
                NUMBERS,
                quiet=rank() > 0,
            )
        return None

    def _lower_scale(self) -> bool:
        """Lower the scale of fp16's loss, of which gradients have overflowed; False if it is as low as it may be."""
        scale = self.scaler.get_scale()
        if not self.scaler.is_enabled() or scale <= MIN_SCALE:
            return False
        self.scaler.update(max(scale * self.scaler.get_backoff_factor(), MIN_SCALE))
        self.scaler.load_state_dict(self.scaler.state_dict() | dict(_growth_tracker=0))
        if self.scaler.get_scale() == MIN_SCALE:
            self.message(f"fp16's loss scale has fallen to {MIN_SCALE:g}, its floor: {REMEDIES}")
        return True

    def _gradient(self) -> str:
        """Describe the gradient that is not finite; of several that of the last layer, from which others follow."""
        bad = [name for name, p in self.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        floor = f" at the loss scale's floor of {MIN_SCALE:g}" if self.scaler.is_enabled() else ""
        return (
            f"the gradient of {bad[-1]} is not finite{floor}" if bad else "a gradient of another process is not finite"
        )

    def _warn(self, step: int, reason: str, parts: list[Part]) -> None:
        found = [part for each in all_gather_object(parts) for part in each]
        named = sorted((part for part in found if part.module), key=lambda part: part.position)
        named = [part for part in named if part.position == named[0].position]  # others follow, by way of SyncBatchNorm
        where = "no output of a module was not finite in a second forward pass"
        if named:
            on = f" in process {named[0].rank}" if world_size() > 1 else ""
            where = f"the first output that is not finite is that of {named[0].module}{on}"
        images = [name for part in [part for part in named if part.narrowed] or named or found for name in part.images]
        count = f"{self.state.skipped_in_row} in a row, {self.max_skipped} end the run"
        text = f"warning: step {step} is skipped ({count}): {reason}; {where}; images: "
        more = f", … and {len(images) - SHOWN} more (log.txt lists them)" if len(images) > SHOWN else ""
        self.message(text + ", ".join(images), show=not more)
        if more:
            self.message(text + ", ".join(images[:SHOWN]) + more, keep=False)

    def _watch(self, step: int, loss: float) -> None:
        """Report the first loss in a row that is far above those before."""
        if self.loss_spike is not None and len(self._recent) >= ENOUGH:
            usual = median(self._recent)
            spiking = loss > self.loss_spike * usual > 0
            if spiking and not self._spiking:
                self.message(
                    f"warning: the loss of step {step} is {loss:.4g}, {loss / usual:.1f} times the median of the "
                    f"{len(self._recent)} before, {usual:.4g}"
                )
            self._spiking = spiking
        self._recent.append(loss)


def examine(model: nn.Module, forward: Callable[[], Any], images: Sequence[str]) -> Part:
    """Run `forward` with hooks that find the first module of a model whose output is not finite; restore its buffers.

    images: names of the batch's images, in order; reduced to those with an output that is not finite where this shows.
    """
    first: list[tuple[str, Tensor]] = []
    calls = 0
    names = {module: name for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        if not first:
            calls += 1
            bad = next((t for t in _tensors(output) if not _is_finite(t)), None)
            if bad is not None:
                first.append((names[module] or "the model", bad.detach()))

    handles = [module.register_forward_hook(hook) for module in names]
    try:
        with kept_buffers(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if not first:
        return Part(rank(), list(images), None, False)
    module, output = first[0]
    rows = list(range(len(images)))
    if output.dim() and len(output) == len(images):
        rows = (~output.isfinite()).flatten(1).any(1).nonzero().flatten().tolist() if output.dim() > 1 else rows
    return Part(rank(), [images[row] for row in rows], module, len(rows) < len(images), calls)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers after the block."""
    kept = copy_buffers(model)
    try:
        yield
    finally:
        restore_buffers(kept)


def copy_buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return a model's buffers, each with a copy."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


@torch.no_grad()
def restore_buffers(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Set the buffers of `copy_buffers` to their copies."""
    for buffer, value in kept:
        buffer.copy_(value)


def _is_finite(tensor: Tensor) -> bool:
    return bool(local_tensor(tensor).isfinite().all())


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's output: in any lists, tuples, dicts and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from chain.from_iterable(map(_tensors, output.values()))
    elif isinstance(output, (list, tuple)):
        yield from chain.from_iterable(map(_tensors, output))
