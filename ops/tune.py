"""Time a few launch configurations of every kernel on this GPU and keep the fastest: `python -m saccade.ops.tune`.

Kernels are launched with configurations that were chosen by ahead-of-time compilation, unless a table for the GPU has
faster ones. Tables are JSON files, one per kind of GPU: those that ship with saccade are in ops/tuned/, a user's own,
which come first, in $SACCADE_TUNED, else in saccade/tuned/ under $XDG_CACHE_HOME or ~/.cache. Without a table, or with
one that cannot be used, the defaults are launched.

Nothing is timed in a run, unless it is asked for: by SACCADE_TUNE=1 in the environment, or in a block

    with saccade.ops.tune.tuning():
        model(images).sum().backward()

Then each kernel that has no entry is timed at its first launch, and the table is written at the end.
"""

import argparse
import atexit
import contextlib
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .aot import OPERATORS

SHIPPED = Path(__file__).parent / "tuned"
FORMAT = 1
_active = os.environ.get("SACCADE_TUNE", "0").lower() in ("1", "true", "on", "yes", "y")
_found: dict[str, dict[str, dict]] = {}  # by card: what this process timed


def folder() -> Path:
    """Return the folder of the user's tables."""
    if chosen := os.environ.get("SACCADE_TUNED"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "saccade", "tuned")


def file_name(card: str) -> str:
    """Return the file name of a GPU's table, such as nvidia_h200.json."""
    return re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_") + ".json"


def read(path: Path, card: str) -> dict[str, dict]:
    """Return the entries of a table, by key. A file that is not there has none; one that cannot be used has none
    either, and is named in a warning."""
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _unusable(path, f"it cannot be read ({error})")
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        return _unusable(path, f"it is not of format {FORMAT}")
    if table.get("card") != card:
        return _unusable(path, f"it is for {table.get('card')!r}, not for {card!r}")
    entries = table.get("entries")
    if not isinstance(entries, dict) or not all(isinstance(value, dict) for value in entries.values()):
        return _unusable(path, "its entries must be objects by key")
    return entries


def _unusable(path: Path, reason: str) -> dict[str, dict]:
    warnings.warn(f"{path} is not used: {reason}; python -m saccade.ops.tune writes it anew", stacklevel=3)
    return {}


@functools.cache
def table(card: str) -> dict[str, dict]:
    """Return the entries for a GPU: the user's over those that ship. Files are read once per process."""
    return read(SHIPPED / file_name(card), card) | read(folder() / file_name(card), card)


def write(card: str, entries: dict[str, dict], path: Path | None = None) -> Path:
    """Add entries to the user's table of a GPU, or to the table at path, atomically. Return its path."""
    path = path or folder() / file_name(card)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unusable file is replaced
        entries = read(path, card) | entries
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps(dict(format=FORMAT, card=card, entries=dict(sorted(entries.items()))), indent=1)
    beside.write_text(text + "\n")
    beside.replace(path)
    return path


def variants(options: dict[str, Any]) -> list[dict[str, int]]:
    """Return the changes of a kernel's launch configuration that are timed, none of them first: half and twice the
    warps, and one pipeline stage or two. They change neither tiles nor grids, so any of them is right."""
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    changes = [dict(num_warps=n) for n in (warps // 2, 2 * warps) if 1 <= n <= 16]
    return [{}, *changes, dict(num_stages=2 if stages == 1 else 1)]


def key(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> str:
    """Return what a kernel is tuned by: its name, the dtypes of its tensors, its constants and launch configuration,
    but no sizes."""
    operator = kernel.__module__.split(".")[-2]
    dtypes = [str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, Tensor)]
    constants = [f"{name}={value}" for name, value in sorted(options.items())]
    return " ".join([f"{operator}.{kernel.__name__}", ",".join(dict.fromkeys(dtypes)), *constants])


@functools.cache
def _card(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return kernel[grid], which launches with the given configuration, or with the one that its GPU's table has."""
    return functools.partial(_launch, kernel, grid)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    device = next(x for x in args if isinstance(x, Tensor)).device
    if device.type == "cuda":
        run = None
        if _active and not torch.cuda.is_current_stream_capturing():

            def run(change: dict) -> None:
                kernel[grid](*args, **options | change)

        options = configured(_card(device.index), kernel, args, options, run)
    kernel[grid](*args, **options)


def configured(
    card: str, kernel: Any, args: Sequence[Any], options: dict[str, Any], run: Callable[[dict], Any] | None = None
) -> dict[str, Any]:
    """Return options with the change that the GPU's table has for this launch; without an entry, and if run(change)
    launches with a change, time the variants first."""
    entries = table(card)
    if not entries and run is None:
        return options
    name = key(kernel, args, options)
    change = entries.get(name)
    if change is None and run is not None:
        change = entries[name] = fastest(run, options)
        _found.setdefault(card, {})[name] = change
    return options | change if change in variants(options) else options  # of another version: not used


def fastest(run: Callable[[dict], Any], options: dict[str, Any], time: Callable | None = None) -> dict[str, int]:
    """Return the change of options with which run(change) takes the least time; changes that do not run are skipped.

    time: takes a function and returns the time that it takes; default: triton.testing.do_bench.
    """
    if time is None:
        from triton.testing import do_bench

        time = do_bench
    times: list[tuple[float, dict]] = []
    for change in variants(options):
        try:
            times.append((time(lambda change=change: run(change)), change))
        except Exception as error:  # too much shared memory, or a fault of the compiler
            if not change:
                raise
            warnings.warn(f"{change} does not run: {type(error).__name__}", stacklevel=2)
    default = times[0][0]
    best, change = min(times, key=lambda pair: pair[0])
    return change if best < 0.98 * default else {}  # less is noise


def save() -> list[Path]:
    """Write what this process timed to the user's tables. Return their paths."""
    paths = [write(card, entries) for card, entries in _found.items()]
    _found.clear()
    return paths


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Time each kernel that has no entry at its first launch within the block, then write the tables."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before
        save()


if _active:
    atexit.register(save)


def examples(
    dtype: torch.dtype, device: str, batch: int = 64, side: int = 56
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield operators by name, and calls of them at the shapes of their models.

    side: of the maps of the first stage, a multiple of 28; 56 for images of 224 x 224.
    """
    from . import (
        agent_attention,
        bilevel_routing_attention,
        channel_attention,
        dfa3d,
        gaussian_gate,
        halo_attention,
        neighborhood_attention,
        predict_mask,
        region_routing,
        sparse_attention,
        spatial_gate,
        strip_gate,
        subspace_gate,
        window_attention,
    )

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def rand_map(*shape: int) -> Tensor:
        return rand(*shape).detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def running(n: int) -> list[Tensor]:
        return [torch.ones(n, device=device) for _ in range(2)]

    N = side * side
    call: Callable[..., Callable[[], Any]] = functools.partial
    qkv = rand(batch, N, 3, 96)
    factors = [(rand(3, 9, 7, 7), rand(3, 9, side), rand(3, 9, side)) for _ in range(2)]
    given: tuple[Any, ...] = *qkv.unbind(2), rand(batch, 9, 96), *factors, 3, None, rand(96, 1, 3, 3), rand(96)
    yield "agent_attention", call(agent_attention, *given)
    for stage, topk in enumerate((1, 4, 16)):
        h, C = side >> stage, 64 << stage
        regions = (7, 7) if h % 7 == 0 else (h // 2, h // 2)
        routed = rand(batch, h, h, 3 * C)
        idx = region_routing(routed, (h // regions[0], h // regions[0]), min(topk, regions[0] ** 2))
        yield "bilevel_routing", call(bilevel_routing_attention, routed, idx, C // 32, regions)
    yield "channel_attention", call(channel_attention, rand(batch, side, side, 3 * 96), 3)
    locations = torch.rand(batch, N, 8, 1, 8, 3, device=device)
    depth, weights = rand(batch, N, 1, 112).softmax(-1), rand(batch, N, 8, 1, 8)
    yield "dfa3d", call(dfa3d, rand(batch, N, 8, 32), depth, [(side, side)], locations, weights)
    gate: tuple[Any, ...] = rand(96, 96, 2), *(rand(96) for _ in range(4)), *running(96), *running(96), True
    yield "gaussian_gate", call(gaussian_gate, rand_map(batch, 96, side, side), *gate)
    q, kv = rand_map(batch, 64, side, side), rand_map(batch, 128, side, side)
    yield "halo_attention", call(halo_attention, q, kv, rand(27, 16), rand(27, 16), 4, 8, 3)
    neighbors = rand(batch, side, side, 3, 64), 2, (7, 7), rand(2, 13, 13)
    yield "neighborhood_attention", call(neighborhood_attention, *neighbors)
    tokens = rand(batch, 197, 3 * 384)
    q, k, _ = tokens.unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)
    predictor = rand(32, 64), rand(32), rand(32, 64), rand(32), rand(197, 32), rand(197, 32)
    mask = predict_mask(q, k, *predictor, budget=50, topk=10)
    yield "sparse_attention", call(sparse_attention, tokens, mask, 6)
    gate = rand(48), rand(48), rand(48), *running(48), True
    yield "spatial_gate", call(spatial_gate, rand_map(batch, 96, side, side)[:, :48], *gate)
    gate = rand(256, 8, 5), rand(256), rand(256), 16
    yield "strip_gate", call(strip_gate, rand_map(batch, 256, side, side), *gate)
    gate = *(rand(128) for _ in range(5)), *(rand(4) for _ in range(3)), *running(128), *running(4), True, 0.1
    yield "subspace_gate", call(subspace_gate, rand(batch, 128, side, side), *gate)
    windows = rand(batch, side, side, 3, 96), 3, (7, 7)
    yield "window_attention", call(window_attention, *windows, (0, 0), None, rand(3, 96))
    yield "window_attention", call(window_attention, *windows, (3, 3), rand(3, 13, 13))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saccade.ops.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--operators", nargs="+", metavar="NAME", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"], default=["bfloat16"])
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use, so there is nothing to time")
    with tuning():
        for dtype in args.dtypes:
            for name, call in examples(getattr(torch, dtype), "cuda", args.batch):
                if name in args.operators:
                    call().float().sum().backward()
                torch.cuda.synchronize()
        for card, entries in _found.items():
            for name, change in sorted(entries.items()):
                print(f"{name}: {change or 'as it is'}")
            print(f"{card}: {len(entries)} kernels in {folder() / file_name(card)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
