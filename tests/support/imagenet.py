"""A small ImageNet in every layout that people have it in: the same images and labels in each."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02084071", "n03000134")
KIT = "ILSVRC2012_devkit_t12"


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG of smooth colours that differ from seed to seed."""
    corners = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def tarred(files: dict[str, bytes]) -> bytes:
    """The bytes of a tar file with these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return file.getvalue()


def images(per_class: int = 6, val: int = 10) -> dict[str, dict[str, tuple[str, bytes]]]:
    """{"train" or "val": {file name: (wnid, JPEG)}}; val images are numbered without regard to their class."""
    train = {
        f"{wnid}_{10 * i + 3}.JPEG": (wnid, picture(100 * c + i))
        for c, wnid in enumerate(WNIDS)
        for i in range(per_class)
    }
    classes = np.random.default_rng(0).integers(0, len(WNIDS), val)
    validation = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": (WNIDS[c], picture(9000 + i)) for i, c in enumerate(classes)}
    return dict(train=train, val=validation)


def folder(root: Path, splits: dict) -> Path:
    """ROOT/train/WNID/NAME."""
    for split, files in splits.items():
        for name, (wnid, data) in files.items():
            path = root / split / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def devkit(wnids: tuple[str, ...], truth: list[str]) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz, with synsets above the classes as the real one has, in an order of its own."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    fields += [("children", "O"), ("wordnet_height", "f8"), ("num_train_images", "f8")]
    ids = {wnid: i + 1 for i, wnid in enumerate(reversed(wnids))}  # not in the order of the WordNet numbers
    rows = [(i, wnid, f"name of {wnid}", "", 0, np.zeros(0), 0, 6) for wnid, i in ids.items()]
    rows.append((len(wnids) + 1, "n00001740", "entity", "", len(wnids), np.arange(1.0, len(wnids) + 1), 1, 0))
    meta = io.BytesIO()
    savemat(meta, dict(synsets=np.array(rows, fields)[:, None]))
    lines = "".join(f"{ids[wnid]}\n" for wnid in truth)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        add(tar, f"{KIT}/data/meta.mat", meta.getvalue())
        add(tar, f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
        add(tar, f"{KIT}/readme.txt", b"")
    return file.getvalue()


def tars(root: Path, splits: dict) -> Path:
    """ImageNet's original three files."""
    root.mkdir(parents=True, exist_ok=True)
    train, val = splits["train"], splits["val"]
    wnids = tuple(dict.fromkeys(wnid for wnid, _ in train.values()))
    inner = {w: tarred({name: data for name, (wnid, data) in train.items() if wnid == w}) for w in wnids}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tarred({f"{wnid}.tar": data for wnid, data in inner.items()}))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tarred({name: data for name, (_, data) in val.items()}))
    (root / f"{KIT}.tar.gz").write_bytes(devkit(wnids, [wnid for wnid, _ in val.values()]))
    return root


def shards(root: Path, splits: dict, samples: int = 7, listed: bool = True, label: str = "cls") -> Path:
    """webdataset shards as others write them: ROOT/SPLIT-0000.tar, and an index.json if `listed`.

    label: in NAME.cls, the number, or in NAME.json, with other things.
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
            data = tarred(members)
            (root / f"{split}-{n:04d}.tar").write_bytes(data)
            index["shards"][f"{split}-{n:04d}.tar"] = dict(samples=len(items[first : first + samples]), bytes=len(data))
    if listed:
        (root / "index.json").write_text(json.dumps(index))
    return root
