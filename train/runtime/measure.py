"""Measuring time, memory and arithmetic, for tools/benchmark.py and its like.

Times are medians of interleaved runs (A B A B …), so that a drift of the machine's speed affects all of them equally.
"""

import multiprocessing
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .log import cpu_name


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: dict[Any, Callable[[], Any]],
    runs: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds of each of `runs` runs of each step, taken in turn after two runs that are not counted."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for i in range(runs + 2):
        for name, step in steps.items():
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            if i >= 2:
                times[name].append(clock() - start)
    return times


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median of the ratios run by run."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def step_of(model: nn.Module, x: Tensor, mode: str, amp: torch.dtype | None = None) -> Callable[[], None]:
    """One `inference` (no gradients) or `training` step (forward, backward of a sum, gradients dropped) on images x."""
    model.train(mode == "training")

    def step() -> None:
        model.train(mode == "training")
        with (
            torch.inference_mode(mode == "inference"),
            torch.autocast(x.device.type, amp, enabled=amp is not None),
        ):
            y = model(x)
        if mode == "training":
            y.float().sum().backward()
            model.zero_grad(set_to_none=True)

    return step


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """FLOP/s of a large square matrix product on random data: the ceiling that a dense model is compared with."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"mm": lambda: torch.mm(a, b)}, 7, device)["mm"]
    return 2 * size**3 / statistics.median(times)


def copy_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Bytes/s, read and written, of copying a tensor of 256 MiB: the ceiling of an operator bound by memory."""
    a = torch.randn(2**28 // dtype.itemsize, device=device).to(dtype)
    b = torch.empty_like(a)
    times = interleaved({"copy": lambda: b.copy_(a)}, 9, device)["copy"]
    return 2 * a.nbytes / statistics.median(times)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [int(f.read_text().rstrip("K\n")) << 10 for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max(sizes, default=32 << 20)


def peak_allocated(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes that PyTorch allocates within step(), beyond those allocated before: also inside custom
    operators, so the buffers of kernels count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one inference on x, as torch's FLOP counter sees them (matrix products, convolutions)."""
    known = -1
    while known < len(flop_registry):  # a counter does not see formulas that the first call of an operator registers
        known = len(flop_registry)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x)
    return counter.get_total_flops() // 2


def _rss() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def _peak_in_child(build: Callable[..., Callable[[], None]], args: tuple, threads: int, send) -> None:
    torch.set_num_threads(threads)
    step = build(*args)
    before = _rss()
    done = threading.Event()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, _rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    send.send(max(highest, _rss()) - before)


def peak_memory(build: Callable[..., Callable[[], None]], *args) -> int:
    """Bytes by which one run of build(*args)() raises a fresh process's resident memory (sampled; Linux).

    Weights and input are allocated before, so that activations, buffers and, in training, gradients are counted.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saccade.backbones"])  # imported once, not for every measurement
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(build, args, torch.get_num_threads(), send))
    child.start()
    send.close()
    peak = receive.recv()
    child.join()
    return peak


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe the machine that a measurement is made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )
