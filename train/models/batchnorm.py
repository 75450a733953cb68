"""BatchNorm's need of more than one value per channel."""

import math
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..runtime.distributed import SyncBatchNorm, world_size
from ..runtime.errors import UserError


def check_batch_statistics(
    model: nn.Module, frozen: Sequence[nn.Module], images: int, probe: Callable[[nn.Module], None]
) -> None:
    """Raise UserError if a BatchNorm would compute a variance of one value per channel.

    frozen: modules that stay in eval mode. images: number of images in one forward pass of a process. probe: runs the
    model on one image.
    """
    if images > 1:
        return
    model.train()
    for module in frozen:
        module.eval()
    values: dict[str, float] = {}  # per channel, of one image

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            values[name] = min(values.get(name, math.inf), inputs[0].numel() // inputs[0].shape[1])

        return hook

    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    handles = [norm.register_forward_pre_hook(record(name)) for name, norm in norms.items()]
    probe(model)
    for handle in handles:
        handle.remove()
    for name, count in values.items():
        synchronized = isinstance(norms[name], (SyncBatchNorm, nn.SyncBatchNorm))
        if count * images * (world_size() if synchronized else 1) == 1:
            raise UserError(
                f"{name or 'the model'} is a BatchNorm that would train on one value per channel (a map of 1x1, one "
                "image per forward pass of a process): raise batch_size, lower accumulate, or use larger images"
            )
