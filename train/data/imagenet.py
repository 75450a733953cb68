"""ImageNet as people have it: class folders, the original tar files, or webdataset shards."""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.config import Count, NonNegativeInt
from ..runtime.errors import DATA, UserError
from .files import note
from .folder import ImageFolder
from .images import Files, Source
from .tar import Members, Samples, cache_folder, expand, fetch, index, is_stream

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
INDEX = "index.json"  # {"classes": [names], "shards": {file name: {"samples", "bytes", "sha256", …}}}


class ImageNet(Source):
    """The data of a run.

    root: a folder with train and val and in each a folder a class (see ImageFolder); with the three files
    ILSVRC2012_img_train.tar, …_img_val.tar and …_devkit_t12.tar.gz; or with shards that tools/shard.py wrote.
    train, val, test: or the shards of each split: a file, a pattern ("shards/train-{000000..000146}.tar", "val-*.tar"),
    a stream ("pipe:aws s3 cp s3://bucket/val-{00..31}.tar -"), or a list of these. Without test that is val.
    index: the shards' index.json, where it is not beside them. classes: how many there are, where no index says it.
    cache_dir: where streams are kept; None: the user's cache folder.
    img_size: pixels a side; None: what the model's published weights were trained at. augment: arguments of
    timm.data.create_transform for training. sizes: pixels a side in training by the first epoch, as in
    {0: 192, 280: 224}. max_bad: how many samples a run goes on without, images that can't be read and what torn tars
    have lost.
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
    ):
        super().__init__(img_size, sizes, augment, max_bad)
        patterns = {split: given for split, given in dict(train=train, val=val, test=test).items() if given}
        if (root is None) == (not patterns):
            raise UserError("data needs either root, a folder, or train and val, the shards of each")
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
            self._layout = _Shards(_listed(Path(root)), str(Path(root, INDEX)), None, cache_folder())
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

    @classmethod
    def scanned(cls, root: str | None = None, **_: object) -> list[Path]:
        """Return the folders all of whose images are taken as data: no run may write there."""
        packed = root is None or any(Path(root, name).is_file() for name in (TRAIN, VAL, INDEX))
        return [] if packed else ImageFolder.scanned(root)


class _Tars:
    """The original files. Classes are in the order of their WordNet numbers, as folders are."""

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
            raise UserError(f"{kit} can't be read as ImageNet's development kit ({error}): fetch it again") from error

    def images(self, split: str) -> tuple[Members, list[int]]:
        tar = self.root / (TRAIN if split == "train" else VAL)
        if not tar.is_file():
            raise UserError(f"there is no {tar}, which the {split} split is made of")
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
        self.bad |= _missing(str(tar), samples, expected)
        return Members([(tar, samples)]), labels


def _classes(meta: bytes) -> dict[int, str]:
    """Return the WordNet number of each class, by its number in the development kit; synsets with children are none."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets) if s["num_children"] == 0}


class _Shards:
    """Shards of each split, by patterns. listed: an index.json; None: the one beside the first shard, if there is."""

    def __init__(self, patterns: dict[str, Any], listed: str | None, classes: int | None, cache: Path):
        self.bad, self.cache = {}, cache
        self.names = {split: list(expand(given)) for split, given in patterns.items()}
        beside = [Path(name).parent / INDEX for names in self.names.values() for name in names if not is_stream(name)]
        if listed is None and beside and beside[0].is_file():
            listed = str(beside[0])
        known = read_index(fetch(listed, cache) if is_stream(listed) else Path(listed)) if listed else {}
        self.listed: dict[str, dict] = known.get("shards", {})
        if classes is not None and known and classes != len(known["classes"]):
            raise UserError(f"data.classes={classes}, and {listed} has {len(known['classes'])}")
        if classes is None and not known:
            raise UserError("data.classes is missing: the shards have no index.json that says how many there are")
        self.class_names = known["classes"] if known else [str(i) for i in range(classes)]
        self.numbered = not known  # nothing names the classes

    def images(self, split: str) -> tuple[Members, np.ndarray]:
        names = self.names.get("val" if split == "test" and "test" not in self.names else split)
        if names is None:
            raise UserError(f"data.{split} is missing: give the shards of that split")
        entries = [self._entry(name) for name in names]
        paths = [
            fetch(name, self.cache, entry.get("bytes"), entry.get("sha256")) if is_stream(name) else Path(name)
            for name, entry in zip(names, entries)
        ]
        indexed = index(paths, "shard")
        unused = sum((Counter(samples.unused) for samples in indexed), Counter())
        if unused:
            parts = ", ".join(f"{count} {ending}" for ending, count in sorted(unused.items()))
            note(f"{split}: members of shards that are no part of a sample, passed over: {parts}")
        for path, name, samples, entry in zip(paths, names, indexed, entries):
            shard = f"{path} ({name})" if is_stream(name) else name
            self.bad |= _missing(shard, samples, entry.get("samples"))
            beyond = np.flatnonzero((samples.labels < 0) | (samples.labels >= len(self.class_names)))
            if len(beyond):
                first = int(beyond[0])
                raise UserError(
                    f"{shard}!{samples.names[first]} has label {samples.labels[first]}, "
                    f"and there are {len(self.class_names)} classes: labels are 0 … {len(self.class_names) - 1}"
                )
        return Members(list(zip(paths, indexed))), np.concatenate([samples.labels for samples in indexed])

    def _entry(self, name: str) -> dict[str, Any]:
        """Return the index's entry of a shard; of a stream, that of the shard that it names."""
        words = re.split(r"[/\s'\"?&=]+", name) if is_stream(name) else [Path(name).name]
        return next((self.listed[word] for word in words if word in self.listed), {})


def _missing(name: str, samples: Samples, expected: int | None) -> dict[str, tuple[str, int]]:
    """Return what a tar has lost, name -> (reason, samples); where nobody knows how many there were, one at least."""
    count = len(samples.names)
    torn = f": it {samples.torn}" if samples.torn else ""
    if expected is not None and count > expected:
        raise UserError(f"{name} has {count} samples where {expected} are listed: it is another file", DATA)
    if expected is not None and not torn and expected - count == len(samples.half):
        expected = None  # each that is lost has a name
    if expected is not None:
        return {name: (f"has {count} of {expected} samples{torn}", expected - count)} if count < expected else {}
    bad = {f"{name}!{member}": (reason, 1) for member, reason in samples.half.items()}
    if samples.torn and not bad:
        bad[name] = f"{samples.torn}, how many samples are lost is not known", 1
    return bad


def _listed(root: Path) -> dict[str, list[str]]:
    """Return the shards of each split that a folder's index lists."""
    splits: dict[str, list[str]] = {}
    for name in sorted(read_index(root / INDEX)["shards"]):
        splits.setdefault(name.rpartition("-")[0], []).append(str(root / name))
    return splits


def read_index(path: Path) -> dict[str, Any]:
    """Read an index.json; raises UserError for a file that is none."""
    try:
        known = json.loads(path.read_bytes())
        classes, shards = known["classes"], known["shards"]
        if not all(isinstance(name, str) for name in classes) or not all(isinstance(v, dict) for v in shards.values()):
            raise TypeError("wrong types")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of shards ({error}): tools/shard.py writes one") from error
    return known
