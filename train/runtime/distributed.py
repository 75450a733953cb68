"""Distributed training: processes started by torchrun on any number of machines, or a single one without it.

CPU tensors are sent by gloo, CUDA tensors by nccl. All functions work in a single process too, where they do nothing.
"""

import contextlib
import hashlib
import os
import random
import re
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .errors import INTERRUPTED, LOST, PREEMPTED, UserError, options

DEFAULT_TIMEOUT = 600.0  # seconds that a process waits for the others
ROLL_CALL = 5.0  # seconds in which the processes that are left report after one is lost
TIMED_OUT, DISCONNECTED = "timed out", "disconnected"  # reports of processes that have lost another
# What gloo and nccl raise where another process has ended or does not answer.
_PEER_LOST = re.compile(
    r"Connection (closed|reset)|Timed out waiting|Broken pipe|[Tt]imeout caused pair closure|Socket (closed|Timeout)"
    r"|failed to (recv|send)|watchdog|Connection was likely closed"
)


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 … world_size() - 1; number 0 writes files and the log."""
    return dist.get_rank() if dist.is_initialized() else 0


TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
# Launchers that start several processes without telling them what torchrun does: variable with their number -> name.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def is_distributed() -> bool:
    """Tell whether this process is one of several that torchrun (or another launcher, as torchrun does) has started.

    Left-over variables of one process (WORLD_SIZE=1, RANK=0) are a single process. Raises UserError for variables that
    are incomplete or contradict each other, and for several processes that know nothing of one another.
    """
    given = {name: os.environ[name] for name in TORCHRUN if os.environ.get(name)}
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name) or "0"
        if not text.isdecimal():
            raise UserError(f"the environment variable {name}={text} must be a whole number: unset it, or use torchrun")
        numbers[name] = int(text)
    missing = [name for name in TORCHRUN if name not in given]
    if not missing:
        if numbers["RANK"] >= numbers["WORLD_SIZE"]:
            raise UserError(
                f"RANK={numbers['RANK']} must be less than WORLD_SIZE={numbers['WORLD_SIZE']}: unset both environment "
                "variables, or start with torchrun"
            )
        return numbers["WORLD_SIZE"] > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    if numbers["WORLD_SIZE"] > 1 or numbers["RANK"] > 0:
        stated = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"the environment has {stated} but not {', '.join(missing)}: start several processes with torchrun, or "
            f"unset {', '.join(given)} to train in one"
        )
    for name, launcher in LAUNCHERS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{launcher} has started {count} processes that would each train alone ({name}={count}): have it start "
                "one torchrun on each machine, as tools/slurm.sh does"
            )
    return False


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, for the duration of the block.

    Raises UserError where they can't be reached and, with code 69, where another process is lost: killed, or without an
    answer for the time of `set_timeout`.
    """
    if not is_distributed():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(f"waiting for WORLD_SIZE={os.environ['WORLD_SIZE']} processes to meet at {address}", flush=True)
    try:
        store, number, count = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # Processes that torchrun restarts find the addresses of those before them in the store that it keeps. On
            # several machines it has to make a new one each time (docs/train.md): they count restarts differently.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        limit = timedelta(seconds=DEFAULT_TIMEOUT)
        dist.init_process_group(backend, timeout=limit, store=store, rank=number, world_size=count)
    except dist.DistError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes could not meet at {address} ({reason}): start them with "
            "torchrun, or unset WORLD_SIZE to train in one"
        ) from error
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # references to the group in them, freed after it, can hang
        lost = isinstance(error, RuntimeError) and _PEER_LOST.search(str(error))
        ended = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if lost:
            ended = TIMED_OUT if re.search("[Tt]imed? ?out|watchdog", str(error)) else DISCONNECTED
        reports = _roll_call(store, number, count, ended)
        if lost:
            raise _lost(number, count, reports) from error
        raise
    finally:
        dist.destroy_process_group()


def set_timeout(seconds: float) -> None:
    """Set how long a process waits for the others in a collective operation before it ends with code 69."""
    if world_size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def _roll_call(store: dist.Store, number: int, count: int, ended: str) -> dict[int, str]:
    """Report to the other processes that this one ends; return the reports of those that do so within ROLL_CALL.

    ended: this process's own error, or TIMED_OUT or DISCONNECTED if it ends because it has lost another; then the
    reports are waited for. The store may be in a process that no longer answers, so a thread talks to it.
    """
    reports: dict[int, str] = {}
    waits = ended in (TIMED_OUT, DISCONNECTED)

    def talk() -> None:
        with contextlib.suppress(RuntimeError):  # the store's process is gone
            store.set(f"ended {number}", ended)
            reports[number] = ended
            end = time.monotonic() + ROLL_CALL
            while waits and len(reports) < count and time.monotonic() < end:
                for other in set(range(count)) - reports.keys():
                    if store.check([f"ended {other}"]):
                        reports[other] = store.get(f"ended {other}").decode()
                time.sleep(0.05)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    thread.join(1.5 * ROLL_CALL if waits else 1.0)
    return dict(reports)


def _lost(number: int, count: int, reports: dict[int, str]) -> UserError:
    """Return the error of a process that has lost others, which it names.

    Those that have ended with an error of their own; else those without a report; else those that were too slow, and
    found the others gone.
    """
    waiting = [other for other, report in sorted(reports.items()) if report in (TIMED_OUT, DISCONNECTED)]
    own = [f"process {other} ended with {report}" for other, report in sorted(reports.items()) if other not in waiting]
    culprits = sorted(set(range(count)) - reports.keys() - {number})
    if not reports:  # nobody answers where process 0 hosts the store
        culprits = [0] if number else culprits
    elif not culprits and not own and TIMED_OUT in reports.values():
        culprits = [other for other in waiting if reports[other] == DISCONNECTED]
    if culprits and not own:
        names = f"process{'es' if len(culprits) > 1 else ''} {', '.join(map(str, culprits))} of {count}"
        own = [f"{names} was killed, or has not answered within `timeout`"]
    first = min([other for other in waiting if other not in culprits], default=number)
    return UserError(
        f"{'; '.join(own) or 'the connection between the processes broke'}: the others end too; the same command with "
        "--resume continues from the last checkpoint",
        LOST,
        quiet=number != first,
    )


def check_same(facts: Mapping[str, Any]) -> None:
    """Check that all processes have the same facts, name -> value.

    Raises UserError in all of them for one that differs, with both values.
    """
    if world_size() == 1:
        return
    gathered = all_gather_object(facts)
    for number, theirs in enumerate(gathered):
        for key in [*gathered[0], *(key for key in theirs if key not in gathered[0])]:
            ours, other = (each.get(key, "not set") for each in (gathered[0], theirs))
            if ours != other:
                raise UserError(
                    f"{key} is {other} in process {number} and {ours} in process 0: start all processes with the same "
                    "command, data and versions",
                    quiet=rank() > 0,
                )


def choose_device(name: str | None) -> torch.device:
    """Return the named device; by default this process's GPU, or the CPU. Raises UserError for one that is missing."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is not a device: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch sees no GPU here: use {options().device}")
    try:
        if device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # meta, and devices of other builds of torch
        raise UserError(f"torch cannot use device {name} here: use {options().device}") from error
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@contextmanager
def sync_errors() -> Iterator[None]:
    """Raise a UserError that any process raises in the block in all of them; only the first prints it."""
    own = None
    try:
        yield
    except UserError as error:
        own = error
    if world_size() == 1:
        if own:
            raise own
        return
    for number, first in enumerate(all_gather_object(own and (str(own), own.code))):
        if first:
            raise UserError(first[0], first[1], quiet=number != rank()) from own


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel; return it as it is in a single process, or sharded by FSDP."""
    if world_size() == 1 or is_sharded(model):
        return model
    # A warning about depthwise convolutions, whose one input channel has a stride that means nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # Each step's buffers (BatchNorm's running means) need no broadcast: training does not read them, and an evaluation
    # and a checkpoint take those of process 0 (broadcast_buffers).
    ids = [device] if device.type == "cuda" else None
    ddp_model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    if device.type == "cpu" and world_size() > 2:
        ddp_model.register_comm_hook(None, _average_each)
    return ddp_model


def _average_each(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket's gradients one by one.

    Three or more terms are added in an order that depends on a value's position in the message. Buckets are rebuilt
    after a process's first step, so averaging a bucket at once would make a resumed run's first step round differently.
    """
    waiting = [dist.all_reduce(g.div_(world_size()), async_op=True).get_future() for g in bucket.gradients()]
    return torch.futures.collect_all(waiting).then(lambda _: bucket.buffer())


def apply_fsdp(model: nn.Module, device: torch.device, methods: Sequence[str] = ()) -> None:
    """Shard parameters, gradients and optimizer state over the processes (torch's FSDP2).

    Parameters are gathered for a block's forward and backward pass: a block is what timm's models have in lists called
    blocks, layers or layer1 …; the rest of the model is one more unit. All processes must run the model equally often.
    methods: those of the model, besides forward, that training calls.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size(),))
    for block in fsdp_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def fsdp_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that are gathered one at a time."""
    names = [name for name, _ in model.named_modules() if re.search(r"(^|\.)(blocks|layers|layer\d+)\.\d+$", name)]
    inner = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # of nested lists
    return [model.get_submodule(name) for name in inner]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the model, or a part of it, is sharded by FSDP."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor, where `like` is sharded; else the tensor itself."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """Return the processes' values, which can be pickled, in order of rank. All processes must call it."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_max(number: int) -> int:
    """Return the largest of the processes' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of process 0, which are the ones a checkpoint holds, to all processes."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def derive_seed(*key: int | str) -> int:
    """Return a seed, 0 … 2**63 - 1, that is a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed_generators(*key: int | str) -> None:
    """Seed Python's, numpy's and torch's global generators from the key."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class StopRequest:
    """Handles SIGTERM, SIGUSR1 and Ctrl-C: training stops after a step that the processes agree on, with a checkpoint.

    A second Ctrl-C stops at once. code: the exit code of the signal. saved: the sentence about the last checkpoint that
    is printed then.
    """

    def __init__(self) -> None:
        self.asked, self.code, self.saved = False, PREEMPTED, "nothing was saved"
        self._interrupted_at: float | None = None
        self._heard: list[float] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def catch_interrupts(self, catch: bool = True) -> None:
        """Handle Ctrl-C from now on; with False, leave it to Python's KeyboardInterrupt again."""
        signal.signal(signal.SIGINT, self._interrupt if catch else signal.default_int_handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def _interrupt(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at, self.asked, self.code = now, True, INTERRUPTED
            if rank() == 0:  # the handler may have interrupted a print(), which is not reentrant
                os.write(2, b"\nCtrl-C: stopping after this step with a checkpoint; again to stop at once\n")
        elif now - self._interrupted_at > 0.5:  # torchrun may pass on a signal that the terminal has already sent
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt(f"interrupted twice by Ctrl-C, so not saved again: {self.saved}")

    def flags(self, bad: Any) -> list[float]:
        """Return what this process tells the others, which is summed over them in a step's message, for `heard`.

        bad: its new bad images (saccade.train.data.bad_images.BadImages) are to be counted too.
        """
        return [float(self.asked), float(self.code == INTERRUPTED), float(len(bad.new))]

    def heard(self, sums: list[float]) -> None:
        """Take the sums of the processes' flags in the last step's message."""
        self._heard = sums

    def agreed(self, bad: Any, wait: bool = False) -> bool:
        """Tell whether any process has been asked to stop. Every process must call it at the same points.

        Without a message of its own, the answer is that of the last step's; with `wait`, and in a single process, it is
        this moment's. New bad images of any process are shared.
        """
        sums, self._heard = self._heard or [0.0, 0.0, 0.0], None
        if wait or world_size() == 1:
            sums = all_reduce_sum(torch.tensor(self.flags(bad))).tolist()
        asked, interrupted, new = sums
        if interrupted:
            self.code = INTERRUPTED
        if new:
            bad.share()
        return asked > 0


class _AllReduceSum(torch.autograd.Function):
    """Sums over processes; the gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return all_reduce_sum(dy)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the batches of all processes, on any device (torch's own refuses the CPU).

    It takes the tensors of a torch or timm BatchNorm, and the activation of timm's.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self._modules.update(norm._modules)  # timm's `drop` and `act`
        self.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        y = self._normalize(x) if self.training else super().forward(x)
        for module in self.children():
            y = module(y)
        return y

    def _normalize(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = all_reduce_sum(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = _AllReduceSum.apply(x.sum(dims)) / n
        x = x - mean.view(shape)
        var = _AllReduceSum.apply(x.square().sum(dims)) / n
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        x = x * (var + self.eps).rsqrt().view(shape)
        x = x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
        return x.to(dtype)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of a model compute over all processes; in a single process, return the model as it is."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, SyncBatchNorm(child))
    return model
