"""Measure the cost of data loading: our loader, timm's, and decoding only, in alternating runs.

    python tools/benchmark_data.py
    python tools/benchmark_data.py --workers 8 --batch 256 --data imagenet/train
    python tools/benchmark_data.py --augment auto_augment=rand-m9-mstd0.5-inc1 re_prob=0.25

Without --data, JPEGs of 500×375, ImageNet's usual size, are cropped from the photographs that ship with scikit-learn
and scikit-image. Timed are reading a file, decoding, a random crop resized to --size, flips and batching, for the same
files. The uint8 pixels are normalised later, on the device; "normalised" includes normalisation on the CPU, in this
process (saccade) or in the workers (timm). "cropped" is data.decode="cropped", measured where libjpeg-turbo 3 is
installed. "decoding" only decodes whole images, with torchvision or PIL in as many processes. Ratios are medians of the
ratios of consecutive runs, compared with timm's loader of the same kind. With --clock cpu, times are those of all
processors, of this process and the workers together, as other programs disturb them less; images/s are then those that
one core would load. Writes benchmark_data.json to --out.
"""

import argparse
import ast
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of class folders of JPEGs")
    parser.add_argument("--images", type=int, default=512, help="number of images to make without --data")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="worker processes per loader")
    parser.add_argument("--batches", type=int, default=8, help="batches per run")
    parser.add_argument("--runs", type=int, default=11, help="timed runs of each loader")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is measured")
    parser.add_argument("--augment", nargs="*", default=[], metavar="key=value", help="of timm's create_transform")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_data"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from saccade.train.data import turbojpeg
from saccade.train.data.folder import ImageFolder
from saccade.train.data.loader import TrainingOrder, batches
from saccade.train.runtime import measure
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg

CPU = torch.device("cpu")
NORM = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def photographs() -> list[Image.Image]:
    """Return large photographs that ship with packages."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [*load_sample_images().images, *(getattr(data, name)() for name in ("astronaut", "coffee", "rocket"))]
    return [Image.fromarray(picture) for picture in pictures]


def write_images(root: Path, count: int, seed: int = 0) -> None:
    """Write JPEGs of 500×375 to ten class folders: random crops of the photographs at qualities from 75 to 95."""
    rng, pictures = np.random.default_rng(seed), photographs()
    for i in range(count):
        picture = pictures[i % len(pictures)]
        width = int(min(picture.width, picture.height * 4 / 3) * rng.uniform(0.6, 1))
        height = width * 3 // 4
        left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
        cut = picture.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        folder = root / f"{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        cut.save(folder / f"{i}.jpg", quality=int(rng.integers(75, 96)))


class Decoding(Dataset):
    """A dataset that reads and decodes files and discards the pixels."""

    def __init__(self, paths: list[Path], pil: bool):
        self.paths, self.pil = paths, pil

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        data = self.paths[index].read_bytes()
        if self.pil:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB").width
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).shape[2]


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        augment = {key: _literal(value) for key, value in (given.split("=", 1) for given in args.augment)}
    except ValueError:
        parser.error(f"--augment takes key=value, got {' '.join(args.augment)}")
    torch.set_num_threads(1)  # for this process, and so for the workers
    with tempfile.TemporaryDirectory() as scratch:
        root = args.data or Path(scratch)
        if args.data is None:
            write_images(root, args.images)
        paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if len(paths) < args.batch:
            parser.error(f"{root} has {len(paths)} JPEGs in its class folders, fewer than --batch {args.batch}")
        augment = dict(color_jitter=0.0) | augment
        times = compare(args, root, paths, augment)
    report(args, times, augment)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def compare(args: argparse.Namespace, root: Path, paths: list[Path], augment: dict) -> dict[str, list[float]]:
    """Return the seconds of each run, by name of the loader."""
    size = (3, args.size, args.size)
    inputs = dict(input_size=size, interpolation="bilinear", crop_pct=0.875, **NORM)
    decodes = ["exact", "cropped"] if turbojpeg.is_installed() else ["exact"]
    training = {
        decode: ImageFolder(str(root), shares=(0.0, 0.0), augment=augment, decode=decode).dataset("train", inputs, True)
        for decode in decodes
    }
    theirs = create_dataset("", str(root))

    for_timm = augment | dict(color_jitter=augment["color_jitter"] or None)  # with 0, timm adds an idle step
    workers = dict(num_workers=args.workers, persistent_workers=args.workers > 0)

    def ours(normalised: bool, decode: str = "exact") -> Iterator:
        order = TrainingOrder(len(training[decode]), args.batch, 0, 0, 10**6)
        loaded = batches(training[decode], order, 0, args.workers, CPU)
        if not normalised:
            loaded.finish = None
        return iter(loaded)

    def of_timm(normalised: bool) -> Iterator:
        # With its prefetcher, timm's workers return pixels, which the prefetcher would normalise on the device.
        loaded = create_loader(
            theirs,
            size,
            args.batch,
            True,
            interpolation="bilinear",
            use_prefetcher=not normalised,
            device=CPU,
            **workers,
            **NORM,
            **for_timm,
        )
        return endless(loaded if normalised else loaded.loader)

    def decoding(pil: bool) -> Iterator:
        return endless(DataLoader(Decoding(paths, pil), args.batch, shuffle=True, drop_last=True, **workers))

    loaders = {
        "saccade": lambda: ours(False),
        "timm": lambda: of_timm(False),
        "saccade, normalised": lambda: ours(True),
        "timm, normalised": lambda: of_timm(True),
        "decoding (torchvision)": lambda: decoding(False),
        "decoding (PIL)": lambda: decoding(True),
    }
    if "cropped" in decodes:
        loaders["saccade, cropped"] = lambda: ours(False, "cropped")
        loaders["saccade, cropped, normalised"] = lambda: ours(True, "cropped")
    for name in (name for name in loaders if not name.startswith("decoding")):
        images, _ = next(loaders[name]())
        normal = "normalised" in name
        assert images.shape == (args.batch, *size), name
        assert images.dtype == (torch.float32 if normal else torch.uint8) and (images.min() < 0) == normal, name

    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.runs):
        for name, start in loaders.items():
            loader = start()  # its workers end with the run, so they do not disturb others
            for _ in range(2 * args.workers + 1):  # batches read ahead during the start
                next(loader)
            clock = time.perf_counter if args.clock == "wall" else cpu_seconds
            began = clock()
            for _ in range(args.batches):
                next(loader)
            times[name].append(clock() - began)
            del loader
            gc.collect()
    return times


def cpu_seconds() -> float:
    """Return the seconds that this process and its children have computed, over all their threads (Linux)."""
    own = os.getpid()
    processes = [own, *map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split())]
    threads = [thread for process in processes for thread in Path(f"/proc/{process}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def report(args: argparse.Namespace, times: dict[str, list[float]], augment: dict) -> None:
    """Print a table, and write all results to benchmark_data.json."""
    facts, images = measure.machine(CPU) | dict(workers=args.workers), args.batch * args.batches
    fastest = min((name for name in times if name.startswith("decoding")), key=lambda name: sum(times[name]))
    table = Table(title=f"{facts['device']}, {args.workers} worker processes, {args.size}×{args.size}")
    for head in ("loader", "images/s", "of decoding alone", "against timm"):
        table.add_column(head, justify="left" if head == "loader" else "right")
    rows = []
    for name, seconds in times.items():
        row = dict(loader=name, images_per_s=images / statistics.median(seconds))
        peer = "timm, normalised" if "normalised" in name else "timm"
        row |= dict(
            of_decoding=measure.ratio(times[fastest], seconds), against_timm=measure.ratio(times[peer], seconds)
        )
        table.add_row(name, f"{row['images_per_s']:.0f}", f"{row['of_decoding']:.0%}", f"{row['against_timm']:.2f}×")
        rows.append(row)
    console = Console()
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "benchmark_data.json"
    settings = {key: vars(args)[key] for key in ("size", "batch", "batches", "runs", "clock")} | dict(augment=augment)
    file.write_text(json.dumps(dict(machine=facts, **settings, rows=rows), indent=1) + "\n")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
