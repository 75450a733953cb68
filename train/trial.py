"""What a run begins with: what its config builds, the largest batch that fits into memory, and a dry run."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data.loader import TrainingOrder, batches, steps_per_epoch
from .models.batchnorm import check_batch_statistics
from .models.freeze import freeze as freeze_modules
from .runtime import config as configs
from .runtime.distributed import all_reduce_max, choose_device, seed_generators, sync_batchnorm, world_size
from .runtime.errors import UserError
from .runtime.measure import peak_allocated
from .runtime.numbers import kept_buffers
from .runtime.precision import autocasting

SHARE = 0.8  # of the free memory that a batch may fill on a CPU


class Setup(NamedTuple):
    """What a config builds. trained: the part of `net` that is trained. frozen: modules in it that stay in eval mode.
    inputs: the preprocessing. batch_size: a number, also for "auto". per_epoch: steps."""

    device: torch.device
    data: Any
    task: Any
    net: nn.Module
    trained: nn.Module
    frozen: list[nn.Module]
    inputs: dict[str, Any]
    training: Dataset
    validation: Dataset
    autocast: Callable[[], AbstractContextManager]
    batch_size: int
    per_epoch: int


def set_up(
    earlier: Path | None = None,
    /,
    *,
    model: dict,
    data: dict,
    task: dict,
    batch_size: int | Literal["auto"],
    accumulate: int = 1,
    checkpoint: str | None = None,
    precision: str = "fp32",
    freeze: Any = None,
    sync_bn: bool = False,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    seed: int = 0,
    device: str | None = None,
    **_: Any,
) -> Setup:
    """Build what a config names, before it is wrapped for several processes. Seeds the global random generators.

    earlier: the folder of a run that is resumed, see auto_batch_size. The other arguments are those of
    saccade.train.engine.train, of which the further ones are ignored. Raises UserError as training does.
    """
    device = choose_device(device)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=bf16 on the CPU")
    seed_generators(seed)
    data = configs.build(data)
    task = configs.build(task, data)
    net = task.model(**model, checkpoint=checkpoint, new_head=True)
    inputs = data.inputs(net.pretrained_cfg)
    net = net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    task.probe(net, inputs)
    if sync_bn:
        net = sync_batchnorm(net, device)
    if grad_checkpointing:
        net.set_grad_checkpointing(True)
    trained = task.trained(net)
    frozen = freeze_modules(net, freeze) if freeze is not None else []
    training, validation = data.dataset("train", inputs, training=True), data.dataset("val", inputs)
    autocast = autocasting(device, precision)
    if batch_size == "auto":
        batch_size = auto_batch_size(task, net, training, seed, device, autocast, accumulate, earlier)
    per_epoch = steps_per_epoch(len(training), batch_size, accumulate)
    images = batch_size // (accumulate * world_size())
    check_batch_statistics(net, frozen, images, lambda net: task.probe(net, inputs))
    return Setup(
        device, data, task, net, trained, frozen, inputs, training, validation, autocast, batch_size, per_epoch
    )


class _Ignored:
    """Takes note of images that can't be read, and forgets them: the run itself counts them."""

    def note(self, found: dict) -> None:
        pass


def trial_step(
    task: Any,
    net: nn.Module,
    training: Dataset,
    images: int,
    seed: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[], float]:
    """Return a forward and backward pass on `images` training images of this process, which returns the loss.

    It leaves weights, buffers and gradients as they are, and draws from the global random generators.
    """
    order = TrainingOrder(len(training), images * world_size(), seed, 0, 1)
    batch = next(iter(batches(training, order, seed, 0, device, _Ignored())))

    def step() -> float:
        mode = net.training
        net.train()
        try:
            with kept_buffers(net):
                with autocast():
                    loss, _ = task.loss(task.trained(net), batch)
                loss.backward()
                return loss.item()
        finally:
            net.zero_grad(set_to_none=True)
            net.train(mode)

    return step


def auto_batch_size(
    task: Any,
    net: nn.Module,
    training: Dataset,
    seed: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    accumulate: int,
    earlier: Path | None,
) -> int:
    """Return the batch size of batch_size="auto": over all processes and accumulated parts, a power of two for each.

    On a GPU batches are doubled until one does not fit; on a CPU the memory of two small ones is extrapolated to 80 %
    of what is free. The gradients and an optimizer's two moments are left room for. earlier: a run's folder that is
    resumed, whose batch size is kept.

    Raises UserError where not even one image fits.
    """
    if earlier is not None and (earlier / "config.py").is_file():
        return configs.load(earlier / "config.py")["batch_size"]
    most = len(training) // (accumulate * world_size())
    reserve = 3 * sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)

    def step(images: int) -> Callable[[], object]:
        return trial_step(task, net, training, images, seed, device, autocast)

    if device.type == "cuda":
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        images = grow(lambda n: step(n)(), most)
        del held
        torch.cuda.empty_cache()
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        images = extrapolate(lambda n: peak_allocated(step(n), device), free_memory() * SHARE / local - reserve, most)
    seed_generators(seed)
    images = -all_reduce_max(-images)  # the smallest of all processes
    if images < 1:
        raise UserError("batch_size=auto: not even one image fits into memory, use a smaller model or image")
    return images * accumulate * world_size()


def grow(run: Callable[[int], object], most: int) -> int:
    """Return the largest power of two, at most `most`, for which run(n) does not run out of memory; 0 if none."""
    fits = 0
    while (images := max(1, 2 * fits)) <= most:
        try:
            run(images)
        except torch.OutOfMemoryError:
            break
        fits = images
    return fits


def extrapolate(peak: Callable[[int], float], limit: float, most: int) -> int:
    """Return the largest power of two n, at most `most`, for which peak(n), a line, is below limit."""
    if most < 4:
        return most
    low, high = peak(2), peak(4)
    slope = max((high - low) / 2, 1.0)
    images = int(min((limit - (low - 2 * slope)) / slope, most))
    return 1 << (images.bit_length() - 1) if images > 0 else 0


def free_memory() -> int:
    """Return the bytes of memory that this process may still use: the machine's, or less within its control group."""
    free = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free.append(int(limit) - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):  # another version of control groups, or none
        pass
    return min(free)


def dry_run(settings: dict[str, Any]) -> list[str]:
    """Build a run's data and model, try one step, and return lines on it. Nothing is written.

    settings: a valid config. Raises UserError as training does.
    """
    device, data, task, net, _, _, inputs, training, validation, autocast, batch_size, per_epoch = set_up(**settings)
    accumulate, seed = settings.get("accumulate", 1), settings.get("seed", 0)
    steps = settings["epochs"] * per_epoch if settings.get("epochs") else settings["iterations"]
    step = trial_step(task, net, training, batch_size // (accumulate * world_size()), seed, device, autocast)
    losses: list[float] = []
    peak = peak_allocated(lambda: losses.append(step()), device)
    start = time.perf_counter()
    step()
    seconds = (time.perf_counter() - start) * accumulate
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [
        f"data: {len(training):,} training and {len(validation):,} val images, {len(data.class_names)} classes",
        f"model: {settings['model']['name']}, {_count(parameters) / 1e6:.2f} M parameters are trained, "
        f"images of {inputs['input_size'][1]}x{inputs['input_size'][2]}",
        f"steps: {steps:,} of {batch_size} images, {per_epoch:,} an epoch",
        f"one step: loss {losses[0]:.4f}, {seconds:.2f} s, {peak / 2**20:,.0f} MiB beyond weights and optimizer; "
        f"all of them about {steps * seconds / 3600:.2g} h on {device.type}",
    ]


def _count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
