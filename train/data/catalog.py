"""The shards that an index.json lists, in files that are mapped: a start neither parses it nor looks at every shard.

Made where there are more than SHARDS (saccade.train.data.combined), in a folder next to index.json, or in the user's
cache folder if that is not writable, and used until the size or the time of index.json changes:

    meta.json      the stamp, the classes, and the positions of each split's first shard and of the one after its last
    names.u1       the shards' paths, one after another
    ends.i8        where each ends, after a 0
    samples.i8     the number of samples of each, as listed; -1: none is
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.checkpoint import write_text
from .images import Strings
from .mapped import Mapped
from .tar import cache_folder

_VERSION = 1
_FILES = {"names": "u1", "ends": "<i8", "samples": "<i8"}


@dataclass
class Catalog:
    """Shards by path, with their listed numbers of samples (T,); splits: name -> range. stamp: of the index.json."""

    classes: list[str]
    paths: Strings
    samples: np.ndarray
    splits: dict[str, tuple[int, int]]
    stamp: str

    def split(self, name: str) -> tuple[Strings, np.ndarray]:
        """Return the paths of a split's shards, and their numbers of samples."""
        begin, end = self.splits[name]
        return self.paths.part(begin, end), self.samples[begin:end]


def _places(listed: Path) -> tuple[Path, Path]:
    digest = hashlib.sha256(os.fsencode(listed.resolve())).hexdigest()[:24]
    return listed.parent / f".{digest}.shards", cache_folder() / "index" / f"{digest}.shards"


def stamp_of(listed: Path) -> str:
    """Return what tells whether an index.json has changed."""
    stat = listed.stat()
    return json.dumps([_VERSION, str(listed), stat.st_size, stat.st_mtime_ns])


def open_catalog(listed: Path) -> Catalog | None:
    """Open what has been made of an index.json; None if it is missing, damaged or out of date."""
    for place in _places(listed):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            meta = json.loads((place / "meta.json").read_bytes())
            if meta["stamp"] != stamp_of(listed):
                continue
            names, ends, samples = (Mapped(place / f"{n}.{dtype[-2:]}", dtype).array for n, dtype in _FILES.items())
            if len(ends) == len(samples) + 1 and ends[-1] == len(names):
                splits = {name: (begin, end) for name, (begin, end) in meta["splits"].items()}
                return Catalog(meta["classes"], Strings.of_arrays(names, ends), samples, splits, meta["stamp"])
    return None


def write_catalog(listed: Path, stamp: str, known: dict[str, Any], splits: dict[str, list[str]]) -> None:
    """Keep what an index.json contains, if there is a folder that can be written to.

    stamp: of the index.json before it was read. splits: the paths of each split's shards.
    """
    paths = [path for each in splits.values() for path in each]
    strings, ends = Strings(paths), np.cumsum([0, *map(len, splits.values())]).tolist()
    entries = known["shards"]
    samples = np.array([entries[path.rpartition("/")[2]].get("samples", -1) for path in paths], "<i8")
    arrays = dict(names=strings.text, ends=strings.ends.astype("<i8"), samples=samples)
    meta = dict(stamp=stamp, classes=known["classes"], splits=dict(zip(splits, pairwise(ends))))
    for place in _places(listed):
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            for name, dtype in _FILES.items():
                (temporary / f"{name}.{dtype[-2:]}").write_bytes(arrays[name].tobytes())
            write_text(temporary / "meta.json", json.dumps(meta))
            shutil.rmtree(place, ignore_errors=True)
            temporary.rename(place)
            return
        except OSError:  # the folder is read-only, or another process of this machine has been faster
            shutil.rmtree(temporary, ignore_errors=True)
            if open_catalog(listed) is not None:
                return
