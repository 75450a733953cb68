"""Images per second: of the model alone, and including data loading."""

import time

import torch
from torch import nn

from ..runtime.distributed import all_reduce_sum
from ..runtime.measure import synchronize


class Speed:
    """Time a model's calls from construction until `result`, which sums over all processes.

    A process's first batch, which allocates memory and may compile, is not counted if there are others.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device, self.calls = device, []  # (images, start time, end time)
        self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]

    def _before(self, _: nn.Module, inputs: tuple) -> None:
        synchronize(self.device)
        self.calls.append((len(inputs[0]), time.perf_counter(), 0.0))

    def _after(self, *_: object) -> None:
        synchronize(self.device)
        self.calls[-1] = (*self.calls[-1][:2], time.perf_counter())

    def result(self) -> dict[str, float]:
        """Return images_per_s, including data loading, and model_images_per_s."""
        for hook in self._hooks:
            hook.remove()
        if not self.calls:
            rates = [0.0, 0.0]
        else:
            first, counted = self.calls[0], self.calls[1:] or self.calls
            began = first[2] if len(self.calls) > 1 else first[1]
            images = sum(call[0] for call in counted)
            whole, inside = counted[-1][2] - began, sum(end - start for _, start, end in counted)
            rates = [images / max(whole, 1e-9), images / max(inside, 1e-9)]
        whole, inside = all_reduce_sum(torch.tensor(rates, dtype=torch.float64)).tolist()
        return dict(images_per_s=round(whole, 1), model_images_per_s=round(inside, 1))
