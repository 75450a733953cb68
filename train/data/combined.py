"""One index of very many shards, in files that are mapped: a run starts without reading the shards' own indexes.

For SHARDS or fewer, the indexes of the shards are read and concatenated (saccade.train.data.tar). For more, they are
written once to a folder next to the first shard, or in the user's cache folder if that is not writable. The folder is
used until the size or the time of a shard changes:

    meta.json     the stamp, what is incomplete or unused, and the number of samples of each label
    ends.i8       the number of samples up to and with each shard, after a 0
    offsets.i8    of each sample's image in its shard, bytes
    sizes.u4      of it, bytes
    labels.i4
    facts.i8      size and time of each shard
    listed.json   the stamp of the index.json of which all shards have been looked at

With the same index.json, a start looks at SAMPLED shards, and each is looked at when it is opened: a million files need
not be found one by one.
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.checkpoint import write_text
from ..runtime.errors import DATA, UserError, from_os
from .files import note
from .images import Strings
from .mapped import Mapped
from .tar import Kind, Members, Samples, cache_folder, file_lock, index

SHARDS = 1000  # up to which the indexes of the shards are read at each start
SAMPLED = 256  # evenly spaced, of which size and time are compared at a start
VERSION = 2
CHUNK = 256  # shards whose indexes are in memory while the combined one is written


@dataclass
class Combined:
    """The index of several tars: of each sample its offset and size in bytes, and its label; sizes of the tars.

    tars: paths. ends (T + 1,): numbers of samples. class_counts: label -> samples. odd: position of a tar -> its
    Samples, without any sample, if something is incomplete or truncated. unused: members that belong to no sample, by
    extension. unchanged: raises OSError for a tar that is not as it was indexed.
    """

    tars: Sequence[str]
    kind: Kind
    ends: Any
    offsets: Any
    sizes: Any
    labels: Any
    class_counts: dict[int, int]
    odd: dict[int, Samples]
    unused: dict[str, int]
    unchanged: "_Unchanged | None" = None

    def members(self) -> Members:
        """Return the images as one sequence of files; names are read from the index of their tar when they are used."""
        names = _Names(self.tars, self.kind)
        return Members(self.tars, np.asarray(self.ends), self.offsets, self.sizes, names, self.unchanged)


class _Unchanged:
    """Compares tars with what they were when they were indexed, in the folder `place`."""

    def __init__(self, facts: Mapped, place: Path):
        self.facts, self.place = facts, place

    def __call__(self, tar: int, file: io.FileIO) -> None:
        if not self.holds(tar, os.fstat(file.fileno())):
            with suppress(OSError):
                (self.place / "listed.json").unlink(missing_ok=True)  # the next start looks at all
            raise OSError("has changed since it was indexed; the next start indexes it again")

    def holds(self, tar: int, stat: os.stat_result) -> bool:
        """Tell whether a tar has the size and the time that it had."""
        return self.facts[2 * tar : 2 * tar + 2].tolist() == [stat.st_size, stat.st_mtime_ns]


class _Names(Sequence):
    """The names of the samples of each tar."""

    def __init__(self, tars: Sequence[str], kind: Kind):
        self.tars, self.kind = tars, kind

    def __len__(self) -> int:
        return len(self.tars)

    def __getitem__(self, tar: int) -> Sequence[str]:
        return _names(self.tars[tar], self.kind)


@lru_cache(4)
def _names(tar: str, kind: Kind) -> Sequence[str]:
    return index([Path(tar)], kind)[0].names


def combine(tars: Sequence[str], kind: Kind, listed: str | None = None) -> Combined:
    """Return the index of many tars, mapped; written first if there is none yet or a tar has changed.

    listed: the stamp of an index.json that lists them; with the same one as before, not all are looked at.
    Raises UserError for a file that is not a tar or can't be read, and where the index can't be written.
    """
    tars = tars if isinstance(tars, Strings) else Strings(tars)
    named = hashlib.sha256(tars.text)
    named.update(kind.encode())
    digest = named.hexdigest()[:24]
    places = Path(tars[0]).parent / f".{digest}.index", cache_folder() / "index" / f"{digest}.index"
    for place in places:
        if listed is not None and (kept := _open_listed(place, tars, kind, listed)) is not None:
            return kept
    stamp, facts = _stamp(tars, kind)
    kept = _checked(places, tars, kind, stamp, facts)
    if listed is not None:
        with suppress(OSError):
            write_text(kept.unchanged.place / "listed.json", json.dumps(dict(listed=listed, stamp=stamp)))
    return kept


def _checked(places: Sequence[Path], tars: Strings, kind: Kind, stamp: str, facts: np.ndarray) -> Combined:
    """Return the index of tars that have all been looked at."""
    for place in places:
        if (kept := _open(place, tars, kind, stamp)) is not None:
            return kept
    errors = []
    for place in places:
        with file_lock(place):
            if (kept := _open(place, tars, kind, stamp)) is not None:  # written by another process meanwhile
                return kept
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(place, tars, kind, stamp, facts)
            except OSError as error:
                errors.append(from_os(error, f"writing {place}"))
                continue
            if (kept := _open(place, tars, kind, stamp)) is not None:
                return kept
            raise UserError(f"a shard next to {tars[0]} has changed while it was indexed: wait until all are written")
    raise errors[-1]


def _stamp(tars: Strings, kind: Kind) -> tuple[str, np.ndarray]:
    """Return a digest of the names, sizes and times of tars; and sizes and times (T, 2)."""
    facts = np.empty((len(tars), 2), np.int64)

    def look(begin: int) -> None:  # storage may have a high latency
        for i in range(begin, min(begin + 4096, len(tars))):
            stat = os.stat(tars[i])
            facts[i] = stat.st_size, stat.st_mtime_ns

    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(look, range(0, len(tars), 4096)))
    except OSError as error:
        raise from_os(error, f"reading {error.filename}") from error
    stamp = hashlib.sha256(f"{VERSION} {kind}".encode() + tars.text.tobytes() + facts.tobytes()).hexdigest()
    return stamp, facts


def _open_listed(place: Path, tars: Strings, kind: Kind, listed: str) -> Combined | None:
    """Open an index without looking at all tars; None if their index.json is another, or one of a few has changed."""
    try:
        known = json.loads((place / "listed.json").read_bytes())
        if known["listed"] != listed or (kept := _open(place, tars, kind, known["stamp"])) is None:
            return None
        some = np.unique(np.linspace(0, len(tars) - 1, SAMPLED).round().astype(int)).tolist()
        return kept if all(kept.unchanged.holds(i, os.stat(tars[i])) for i in some) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(place: Path, tars: Sequence[str], kind: Kind, stamp: str) -> Combined | None:
    """Open an index; return None if it is missing, damaged or out of date."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        if meta["stamp"] != stamp:
            return None
        files = {"ends": "<i8", "offsets": "<i8", "sizes": "<u4", "labels": "<i4", "facts": "<i8"}
        arrays = {name: Mapped(place / f"{name}.{dtype[1:]}", dtype) for name, dtype in files.items()}
        samples = int(arrays["ends"][-1])
        lengths = {name: len(array) for name, array in arrays.items()}
        if lengths.pop("ends") != len(tars) + 1 or lengths.pop("facts") != 2 * len(tars):
            return None
        if set(lengths.values()) != {samples}:
            return None
        counts = {int(label): count for label, count in meta["class_counts"].items()}
        none = np.empty(0, np.int64)
        odd = {int(i): Samples(Strings(()), none, none, none, *rest, {}) for i, rest in meta["odd"].items()}
        unchanged = _Unchanged(arrays.pop("facts"), place)
        return Combined(tars, kind, *arrays.values(), counts, odd, meta["unused"], unchanged)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _write(place: Path, tars: Sequence[str], kind: Kind, stamp: str, looked_at: np.ndarray) -> None:
    """Write an index atomically, reading the tars' own in chunks."""
    note(f"indexing {len(tars)} shards (once)")
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    ends, counts, unused, odd = [0], Counter(), Counter(), {}
    try:
        with (
            open(temporary / "offsets.i8", "wb") as offsets,
            open(temporary / "sizes.u4", "wb") as sizes,
            open(temporary / "labels.i4", "wb") as labels,
        ):
            for begin in range(0, len(tars), CHUNK):
                chunk = range(begin, min(begin + CHUNK, len(tars)))
                for i, samples in zip(chunk, index([Path(tars[i]) for i in chunk], kind)):
                    if len(samples.sizes) and samples.sizes.max() >= 2**32:
                        raise UserError(f"{tars[i]} has an image of 4 GiB or more", DATA)
                    ends.append(ends[-1] + len(samples.offsets))
                    offsets.write(samples.offsets.astype("<i8").tobytes())
                    sizes.write(samples.sizes.astype("<u4").tobytes())
                    labels.write(samples.labels.astype("<i4").tobytes())
                    values, times = np.unique(samples.labels, return_counts=True)
                    counts.update(dict(zip(values.tolist(), times.tolist())))
                    unused.update(samples.unused)
                    if samples.incomplete or samples.truncated:
                        odd[i] = samples.incomplete, samples.truncated
        (temporary / "facts.i8").write_bytes(looked_at.astype("<i8").tobytes())
        (temporary / "ends.i8").write_bytes(np.array(ends, "<i8").tobytes())
        facts = dict(stamp=stamp, class_counts=counts, odd=odd, unused=unused)
        write_text(temporary / "meta.json", json.dumps(facts))
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)
