"""A small synthetic ImageNet in every layout, with the same images and labels in each."""

import json
from pathlib import Path

from saccade.train.data import synthetic_imagenet
from saccade.train.data.synthetic_imagenet import (  # noqa: F401  (for the tests)
    KIT,
    add_file,
    make_devkit,
    make_tar,
    write_folders,
    write_tars,
)

WNIDS = ("n01440764", "n01443537", "n02084071", "n03000134")


def make_jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    return synthetic_imagenet.make_jpeg(seed, size)


def make_images(per_class: int = 6, val: int = 10) -> synthetic_imagenet.Splits:
    return synthetic_imagenet.make_images(WNIDS, per_class, val, (40, 30))


def write_shards(root: Path, splits: dict, samples: int = 7, listed: bool = True, label: str = "cls") -> Path:
    """Write webdataset shards as other tools do: ROOT/SPLIT-0000.tar, and an index.json if `listed`.

    label: "cls", the number in NAME.cls, or "json", in NAME.json among other fields.
    """
    root.mkdir(parents=True, exist_ok=True)
    wnids = sorted({wnid for files in splits.values() for wnid, _ in files.values()})
    index: dict = dict(classes=wnids, shards={})
    for split, files in splits.items():
        items = list(files.items())
        for n, first in enumerate(range(0, len(items), samples)):
            members = {}
            for name, (wnid, data) in items[first : first + samples]:
                number = wnids.index(wnid)
                text = str(number) if label == "cls" else json.dumps(dict(label=number, name=wnid))
                key = name.partition(".")[0]
                members |= {f"{key}.jpg": data, f"{key}.{label}": text.encode()}
            data = make_tar(members)
            (root / f"{split}-{n:04d}.tar").write_bytes(data)
            index["shards"][f"{split}-{n:04d}.tar"] = dict(samples=len(items[first : first + samples]), bytes=len(data))
    if listed:
        (root / "index.json").write_text(json.dumps(index))
    return root
