"""Processes that train together: started by torchrun (any number of machines), or just one without it.

CPU tensors travel by gloo, CUDA tensors by nccl. All the functions work in a single process too, where they do nothing.
"""

import hashlib
import os
import random
import re
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 … world() - 1; number 0 writes files and the log."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, for the duration of the block.

    Raises UserError where one of them goes away.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # Processes that torchrun starts again find the addresses of those before them in the store that it keeps. On
        # several machines it has to make a new one each time (docs/train.md), for they count restarts differently.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # what they hold of the group, freed after it, can hang for ever
        if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)):
            raise UserError(f"process {rank()} stops because another has; that one's message says why") from error
        raise
    finally:
        dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """`name`, or this process's GPU, or the CPU where there is none. Raises UserError for a GPU that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name!r} is no device: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU here: use device=cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@contextmanager
def sync_errors() -> Iterator[None]:
    """A UserError that any process raises in the block ends all of them, with its exit code and said once."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    if world_size() == 1:
        if mine:
            raise mine
        return
    raised: list = [None] * world_size()
    dist.all_gather_object(raised, mine and (str(mine), mine.code))
    for number, found in enumerate(raised):
        if found:
            raise UserError(*found, quiet=number != rank()) from mine


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the processes; itself where there is only one, or `shard` does it."""
    if world_size() == 1 or is_sharded(model):
        return model
    # Said of depthwise convolutions, whose one input channel has a stride that means nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    shared = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if device.type == "cpu" and world_size() > 2:
        shared.register_comm_hook(None, _average_each)
    return shared


def _average_each(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket's gradients one by one.

    Three or more terms are added in an order that depends on a value's place in the message. Buckets are filled anew
    after a process's first step, so whole buckets would make a resumed run's first step round differently than it did
    before.
    """
    waiting = [dist.all_reduce(g.div_(world_size()), async_op=True).get_future() for g in bucket.gradients()]
    return torch.futures.collect_all(waiting).then(lambda _: bucket.buffer())


def apply_fsdp(model: nn.Module, device: torch.device, methods: Sequence[str] = ()) -> None:
    """Divide parameters, gradients and what an optimiser keeps of them over the processes (torch's FSDP2).

    Parameters come together for the time of a block's forward or backward pass: a block is what timm's models have in
    lists called blocks, layers or layer1 …; the rest of the model is one more unit. All processes must run the model
    equally often. methods: those of the model, besides forward, that training calls.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size(),))
    names = [name for name, _ in model.named_modules() if re.search(r"(^|\.)(blocks|layers|layer\d+)\.\d+$", name)]
    for name in names:
        if not any(other.startswith(f"{name}.") for other in names):  # the innermost of nested lists
            fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided the model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be divided over the processes, all of it, in each; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is divided; else the tensor itself."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0, which are the ones a checkpoint holds."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def derive_seed(*key: int | str) -> int:
    """A seed, 0 … 2**63 - 1, that is a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed_generators(*key: int | str) -> None:
    """Start Python's, numpy's and torch's global generators anew from the key."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class StopRequest:
    """SIGTERM or SIGUSR1 asks for a checkpoint and an end; the processes agree on the step at which they stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def agreed(self, bad: Any) -> bool:
        """Whether any process has been asked. Every process calls it at the same places.

        In the same message they say whether any has new bad images (saccade.train.data.bad_images.BadImages), to be counted.
        """
        asked, new = all_reduce_sum(torch.tensor([float(self.asked), float(len(bad.new))])).tolist()
        if new:
            bad.share()
        return asked > 0


class _Total(torch.autograd.Function):
    """Sum over processes; the gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return all_reduce_sum(dy)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, on any device (torch's own refuses the CPU).

    It takes over the tensors of a torch or timm BatchNorm, and the activation of timm's.
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
        y = self._normalise(x) if self.training else super().forward(x)
        for module in self._modules.values():
            y = module(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = all_reduce_sum(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = _Total.apply(x.sum(dims)) / n
        x = x - mean.view(shape)
        var = _Total.apply(x.square().sum(dims)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        x = x * (var + self.eps).rsqrt().view(shape)
        x = x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
        return x.to(dtype)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every BatchNorm computing over all processes; nothing changes where there is only one."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, SyncBatchNorm(child))
    return model
