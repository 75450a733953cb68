"""Synthetic ImageNet in the layouts of the real one: correct file names and labels, meaningless images."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

KIT = "ILSVRC2012_devkit_t12"
Splits = dict[str, dict[str, tuple[str, bytes]]]  # {"train" or "val": {file name: (wnid, JPEG)}}


def make_images(wnids: Sequence[str], per_class: int, val: int, size: tuple[int, int] = (500, 375)) -> Splits:
    """Make JPEGs of (width, height) `size`. val images are numbered independently of their class, as in ImageNet."""
    train = {
        f"{wnid}_{10 * i + 3}.JPEG": (wnid, make_jpeg(1000 * c + i, size))
        for c, wnid in enumerate(wnids)
        for i in range(per_class)
    }
    classes = np.random.default_rng(0).integers(0, len(wnids), val)
    validation = {
        f"ILSVRC2012_val_{i + 1:08d}.JPEG": (wnids[c], make_jpeg(10**7 + i, size)) for i, c in enumerate(classes)
    }
    return dict(train=train, val=validation)


def make_jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG with a smooth colour gradient that depends on the seed."""
    corners = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_folders(root: Path, splits: Splits) -> Path:
    """Write class folders: ROOT/SPLIT/WNID/NAME."""
    for split, files in splits.items():
        for name, (wnid, data) in files.items():
            path = root / split / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def write_tars(root: Path, splits: Splits, wnids: Sequence[str] | None = None) -> Path:
    """Write ImageNet's three original files. wnids: those of all classes, if some have no images."""
    root.mkdir(parents=True, exist_ok=True)
    train, val = splits["train"], splits["val"]
    used = tuple(dict.fromkeys(wnid for wnid, _ in train.values()))
    inner = {w: make_tar({name: data for name, (wnid, data) in train.items() if wnid == w}) for w in used}
    (root / "ILSVRC2012_img_train.tar").write_bytes(make_tar({f"{wnid}.tar": data for wnid, data in inner.items()}))
    (root / "ILSVRC2012_img_val.tar").write_bytes(make_tar({name: data for name, (_, data) in val.items()}))
    (root / f"{KIT}.tar.gz").write_bytes(make_devkit(wnids or used, [wnid for wnid, _ in val.values()]))
    return root


def make_devkit(wnids: Sequence[str], truth: Sequence[str]) -> bytes:
    """Return ILSVRC2012_devkit_t12.tar.gz, with parent synsets and its own order of classes, as in the real one."""
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
        add_file(tar, f"{KIT}/data/meta.mat", meta.getvalue())
        add_file(tar, f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
        add_file(tar, f"{KIT}/readme.txt", b"")
    return file.getvalue()


def make_tar(files: dict[str, bytes]) -> bytes:
    """Return the bytes of a tar file with these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            add_file(tar, name, data)
    return file.getvalue()


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar from its bytes."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))
