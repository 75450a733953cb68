"""ImageNet in any of its usual layouts: class folders, the original tar files, or webdataset shards."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.config import Count, NonNegativeInt
from ..runtime.errors import DATA, UserError
from .augment import Decode
from .catalog import open_catalog, stamp_of, write_catalog
from .combined import SHARDS, combine
from .files import note
from .folder import ImageFolder
from .images import Files, Source, Strings
from .mapped import Mapped
from .tar import Members, Samples, cache_folder, expand, fetch, index, is_stream

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
INDEX = "index.json"  # {"classes": [names], "shards": {file name: {"samples", "bytes", "sha256", …}}}


class ImageNet(Source):
    """ImageNet as the data of a run.

    root: a folder with train and val, each with one folder per class (see ImageFolder); or with the three files
    ILSVRC2012_img_train.tar, …_img_val.tar and …_devkit_t12.tar.gz; or with shards written by tools/shard.py.
    train, val, test: instead of root, the shards of each split: a file, a pattern
    ("shards/train-{000000..000146}.tar", "val-*.tar"), a stream ("pipe:aws s3 cp s3://bucket/val-{00..31}.tar -"), or a
    list of these. test defaults to val.
    index: the shards' index.json, if it is not next to them. classes: number of classes, if there is no index.
    cache_dir: folder for downloaded streams; None: the user's cache folder.
    img_size: image size in pixels; None: that of the model's published weights. augment: arguments of
    timm.data.create_transform for training. sizes: image size in training from given epochs on, for example
    {0: 192, 280: 224}. max_bad: how many unreadable or missing samples a run tolerates. decode: "exact";
    "cropped": of a JPEG in training no more than the crop is decoded, to the same pixels, which needs libjpeg-turbo 3;
    "scaled": large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that leaves what is needed, in evaluation
    too.
    """

    def __init__(
        self,
        root: str | None = None,
        train: str | Sequence | None = None,
        val: str | Sequence | None = None,
        test: str | Sequence | None = None,
        index: str | None = None,
        classes: Count | None = None,
        cache_dir: str | None = None,
        img_size: Count | None = None,
        augment: dict | None = None,
        sizes: dict | None = None,
        max_bad: NonNegativeInt = 0,
        decode: Decode = "exact",
    ):
        super().__init__(img_size, sizes, augment, max_bad, decode)
        patterns = {split: given for split, given in dict(train=train, val=val, test=test).items() if given}
        if (root is None) == (not patterns):
            raise UserError("data needs either root, a folder, or train and val, the shards of each split")
        if root is None:
            folder = Path(cache_dir) if cache_dir else cache_folder() / "shards"
            self._layout: Any = _Shards(patterns, index, classes, folder)
        elif index or classes or cache_dir:
            raise UserError(
                "data.index, data.classes and data.cache_dir go with data.train and data.val, not with root"
            )
        elif any(Path(root, name).is_file() for name in (TRAIN, VAL)):
            self._layout = _Tars(Path(root))
        elif Path(root, INDEX).is_file():
            self._layout = _Shards(None, str(Path(root, INDEX)), None, cache_folder())
        else:
            self._layout = ImageFolder(root)
        self.class_names = self._layout.class_names
        self.numbered = getattr(self._layout, "numbered", False)

    def images(self, split: str) -> tuple[Files | Members, Sequence[int]]:
        files, labels = self._layout.images(split)
        self.bad |= self._layout.bad
        if not len(files):
            why = [f": {name} {reason}" for name, (reason, _) in self.bad.items()][:1]
            raise UserError("".join([f"the {split} split holds no images", *why]), DATA)
        return files, labels

    def class_counts(self, split: str) -> Sequence[int] | None:
        return getattr(self._layout, "counts", {}).get(split)

    @classmethod
    def scanned(cls, root: str | None = None, **_: object) -> list[Path]:
        """Return the folders whose images are all used as data, so that no run may be written there."""
        packed = root is None or any(Path(root, name).is_file() for name in (TRAIN, VAL, INDEX))
        return [] if packed else ImageFolder.scanned(root)


class _Tars:
    """ImageNet's original tar files. Classes are sorted by WordNet ID, as folders are."""

    def __init__(self, root: Path):
        self.root, self.bad = root, {}
        kit = root / DEVKIT
        try:
            with tarfile.open(kit, "r:gz") as tar:
                inside = {Path(name).name: name for name in tar.getnames()}
                meta = tar.extractfile(inside["meta.mat"]).read()
                truth = tar.extractfile(inside["ILSVRC2012_validation_ground_truth.txt"]).read()
            number = _classes(meta)
            self.class_names = sorted(number.values())
            position = {wnid: i for i, wnid in enumerate(self.class_names)}
            self.truth = [position[number[int(i)]] for i in truth.split()]
        except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
            message = f"{kit} can't be read as ImageNet's development kit ({error}): download it again"
            raise UserError(message) from error

    def images(self, split: str) -> tuple[Members, list[int]]:
        tar = self.root / (TRAIN if split == "train" else VAL)
        if not tar.is_file():
            raise UserError(f"{tar}, which has the {split} split, does not exist")
        (samples,) = index([tar], "tars" if split == "train" else "files")
        if split == "train":
            position = {f"{wnid}.tar": i for i, wnid in enumerate(self.class_names)}
            labels = [position.get(name.partition("/")[0]) for name in samples.names]
        else:
            numbers = [re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.\w+", name) for name in samples.names]
            labels = [self.truth[int(n[1]) - 1] if n and 0 < int(n[1]) <= len(self.truth) else None for n in numbers]
        if None in labels:
            raise UserError(f"{tar}!{samples.names[labels.index(None)]} is no image that {self.root / DEVKIT} knows")
        expected = None if split == "train" else len(self.truth)
        self.bad |= _missing(str(tar), samples, len(samples.offsets), expected)
        return Members.concatenated([(tar, samples)]), labels


def _classes(meta: bytes) -> dict[int, str]:
    """Return the WordNet ID of each class by its ID in the development kit; synsets with children are not classes."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets) if s["num_children"] == 0}


class _Shards:
    """Shards of each split, by patterns; None: all that the index lists, in its folder.

    listed: an index.json; None: the one next to the first shard, if any.
    """

    def __init__(self, patterns: dict[str, Any] | None, listed: str | None, classes: int | None, cache: Path):
        self.bad, self.cache = {}, cache
        self.counts: dict[str, list[int]] = {}  # images of each class of a split, where they are known
        self.catalog = open_catalog(Path(listed)) if patterns is None else None
        if self.catalog is not None:
            self.names, self.class_names, self.numbered = {}, self.catalog.classes, False
            self.listed = {}
            return
        if patterns is not None:
            self.names = {split: list(expand(given)) for split, given in patterns.items()}
            local = next((name for names in self.names.values() for name in names if not is_stream(name)), None)
            if listed is None and local is not None and (beside := Path(local).parent / INDEX).is_file():
                listed = str(beside)
        stamp = stamp_of(Path(listed)) if patterns is None else ""  # before it is read
        known = read_index(fetch(listed, cache) if is_stream(listed) else Path(listed)) if listed else {}
        if patterns is None:
            self.names = _by_split(Path(listed).parent, known["shards"])
            if len(known["shards"]) > SHARDS:
                write_catalog(Path(listed), stamp, known, self.names)
                self.catalog = open_catalog(Path(listed))
        self.listed: dict[str, dict] = known.get("shards", {})
        if classes is not None and known and classes != len(known["classes"]):
            raise UserError(f"data.classes={classes}, but {listed} has {len(known['classes'])}")
        if classes is None and not known:
            raise UserError("data.classes is missing: the shards have no index.json with the number of classes")
        self.class_names = known["classes"] if known else [str(i) for i in range(classes)]
        self.numbered = not known  # nothing names the classes

    def images(self, split: str) -> tuple[Members, np.ndarray | Mapped]:
        splits = self.names if self.catalog is None else self.catalog.splits
        key = "val" if split == "test" and "test" not in splits else split
        if self.catalog is not None and key in splits and np.diff(splits[key]) > SHARDS:
            paths, samples = self.catalog.split(key)
            return self._many(split, paths, paths, samples, self.catalog.stamp)
        if self.catalog is not None and key in splits:
            paths, samples = self.catalog.split(key)
            self.names[key] = list(paths)
            self.listed |= {
                path.rpartition("/")[2]: dict(samples=n) for path, n in zip(paths, samples.tolist()) if n >= 0
            }
        names = self.names.get(key)
        if names is None:
            raise UserError(f"data.{split} is missing: give the shards of that split")
        entries = [self._entry(name) for name in names]
        paths = [
            str(fetch(name, self.cache, entry.get("bytes"), entry.get("sha256"))) if is_stream(name) else name
            for name, entry in zip(names, entries)
        ]
        expected = [entry.get("samples") for entry in entries]
        if len(paths) > SHARDS:
            listed = np.array([-1 if count is None else count for count in expected])
            return self._many(split, names, paths, listed)
        indexed = index([Path(path) for path in paths], "shard")
        self._note_unused(split, sum((Counter(samples.unused) for samples in indexed), Counter()))
        for path, name, samples, count in zip(paths, names, indexed, expected):
            shard = f"{path} ({name})" if is_stream(name) else name
            self.bad |= _missing(shard, samples, len(samples.offsets), count)
            if (wrong := self._wrong(samples.labels)) is not None:
                raise self._beyond(f"{shard}!{samples.names[wrong]}", samples.labels[wrong])
        labels = np.concatenate([samples.labels for samples in indexed])
        return Members.concatenated(list(zip(paths, indexed))), labels

    def _many(
        self,
        split: str,
        names: Sequence[str],
        paths: Sequence[str],
        listed: np.ndarray,
        stamp: str | None = None,
    ) -> tuple[Members, Mapped]:
        """Return what `images` does of more shards than are read at each start.

        listed (T,): numbers of samples, -1 where unknown. stamp: of the index.json, where it lists all of them.
        """
        found = combine(paths, "shard", stamp)
        self._note_unused(split, found.unused)
        counts = np.diff(found.ends)
        empty = Samples(Strings(()), *[np.empty(0, np.int64)] * 3, {}, "", {})
        for i in sorted({*found.odd, *np.flatnonzero((listed >= 0) & (listed != counts)).tolist()}):
            shard = f"{paths[i]} ({names[i]})" if is_stream(names[i]) else names[i]
            expected = int(listed[i]) if listed[i] >= 0 else None
            self.bad |= _missing(shard, found.odd.get(i, empty), int(counts[i]), expected)
        members = found.members()
        if min(found.class_counts, default=0) < 0 or max(found.class_counts, default=0) >= len(self.class_names):
            wrong = self._wrong(np.asarray(found.labels))
            raise self._beyond(members.name(wrong), found.labels[wrong])
        self.counts[split] = [found.class_counts.get(i, 0) for i in range(len(self.class_names))]
        return members, found.labels

    def _note_unused(self, split: str, unused: Mapping[str, int]) -> None:
        if unused:
            parts = ", ".join(f"{count} {ending}" for ending, count in sorted(unused.items()))
            note(f"{split}: skipped members of shards that belong to no sample: {parts}")

    def _wrong(self, labels: np.ndarray) -> int | None:
        """Return the position of the first label that is of no class."""
        beyond = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        return int(beyond[0]) if len(beyond) else None

    def _beyond(self, sample: str, label: int) -> UserError:
        classes = len(self.class_names)
        return UserError(f"{sample} has label {label}, and there are {classes} classes: labels are 0 … {classes - 1}")

    def _entry(self, name: str) -> dict[str, Any]:
        """Return a shard's entry in the index; for a stream, that of the shard that it names."""
        words = re.split(r"[/\s'\"?&=]+", name) if is_stream(name) else [name.rpartition("/")[2]]
        return next((self.listed[word] for word in words if word in self.listed), {})


def _missing(name: str, samples: Samples, count: int, expected: int | None) -> dict[str, tuple[str, int]]:
    """Return the missing samples of a tar, name -> (reason, samples); at least one if their number is unknown.

    count: the number of samples that it has.
    """
    truncated = f": it {samples.truncated}" if samples.truncated else ""
    if expected is not None and count > expected:
        raise UserError(f"{name} has {count} samples, but {expected} are listed: it is another file", DATA)
    if expected is not None and not truncated and expected - count == len(samples.incomplete):
        expected = None  # the name of each missing sample is known
    if expected is not None:
        return {name: (f"has {count} of {expected} samples{truncated}", expected - count)} if count < expected else {}
    bad = {f"{name}!{member}": (reason, 1) for member, reason in samples.incomplete.items()}
    if samples.truncated and not bad:
        bad[name] = f"{samples.truncated}, with an unknown number of missing samples", 1
    return bad


def _by_split(root: Path, listed: Iterable[str]) -> dict[str, list[str]]:
    """Return the shards of each split of a folder. Raises UserError for one that does not exist."""
    splits: dict[str, list[str]] = {}
    for name in sorted(listed):
        path = os.path.join(root, name)
        if not os.path.isfile(path):
            raise UserError(f"there is no shard {path}")
        splits.setdefault(name.rpartition("-")[0], []).append(path)
    return splits


def read_index(path: Path) -> dict[str, Any]:
    """Read an index.json. Raises UserError if it is not valid."""
    try:
        known = json.loads(path.read_bytes())
        classes, shards = known["classes"], known["shards"]
        if not all(isinstance(name, str) for name in classes) or not all(isinstance(v, dict) for v in shards.values()):
            raise TypeError("wrong types")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards ({error}): write one with tools/shard.py") from error
    return known
