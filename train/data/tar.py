"""Random access to images inside tar files, by their offsets.

One pass over a tar's headers builds an index of its samples. It is cached next to the tar (or in the user's cache
folder if that is not writable) until the tar changes.
"""

import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from ..runtime.checkpoint import atomic_write, checksum
from ..runtime.errors import DATA, UserError, from_os
from .images import Strings

VERSION = 2  # of the cached index
IMAGE = ("jpg", "jpeg", "png", "webp")  # extensions of a shard's images
OPEN = 64  # most tars that a process keeps open
Kind = Literal["files", "tars", "shard"]


@dataclass
class Samples:
    """The index of a tar: names of its images (member, or tar/member), their offsets and sizes in bytes, and labels.

    labels: of a shard's samples, else -1. incomplete: samples without an image, a label or a unique key, name ->
    reason. truncated: how the tar is truncated or damaged, or "". unused: number of members that belong to no sample,
    by extension.
    """

    names: Strings
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64
    incomplete: dict[str, str]
    truncated: str
    unused: dict[str, int]


class Members:
    """The images of several tars as one sequence of files (see images.Images).

    tars (T,): paths. ends (T + 1,): numbers of images up to and with each tar, after a 0. offsets, sizes (N,): of each
    image in its tar, bytes. names (T,): the names of each tar's images. check: called with the number of a tar and its
    file where it is opened; raises OSError for one that is not as it was indexed.
    """

    def __init__(
        self,
        tars: Sequence[str],
        ends: Any,
        offsets: Any,
        sizes: Any,
        names: Sequence[Sequence[str]],
        check: Callable[[int, io.FileIO], None] | None = None,
    ):
        self.tars, self.ends, self.offsets, self.sizes, self.names = tars, ends, offsets, sizes, names
        self.check = check
        self.open: OrderedDict[int, io.FileIO] = OrderedDict()

    @classmethod
    def concatenated(cls, tars: Sequence[tuple[Path, Samples]]) -> "Members":
        """Return the images of tars from their indexes."""
        samples = [each for _, each in tars]
        ends = np.cumsum([0, *(len(each.offsets) for each in samples)])
        places = (np.concatenate([getattr(each, key) for each in samples]) for key in ("offsets", "sizes"))
        return cls([str(tar) for tar, _ in tars], ends, *places, [each.names for each in samples])

    def __getstate__(self) -> dict:  # worker processes open their own files
        return self.__dict__ | dict(open=OrderedDict())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        tar = int(np.searchsorted(self.ends, index, "right")) - 1
        return tar, index - int(self.ends[tar])

    def name(self, index: int) -> str:
        tar, i = self._find(index)
        return f"{self.tars[tar]}!{self.names[tar][i]}"

    def base(self, index: int) -> str:
        tar, i = self._find(index)
        return self.names[tar][i]

    def read(self, index: int) -> bytes:
        tar, _ = self._find(index)
        if tar not in self.open:
            if len(self.open) == OPEN:
                self.open.popitem(last=False)[1].close()
            file = io.FileIO(self.tars[tar])
            if self.check is not None:
                self.check(tar, file)
            self.open[tar] = file
        self.open.move_to_end(tar)
        size = int(self.sizes[index])
        data = os.pread(self.open[tar].fileno(), size, int(self.offsets[index]))  # keeps the file position
        if len(data) < size:
            raise OSError(f"has only {len(data)} of {size} bytes")
        return data


def index(tars: Sequence[Path], kind: Kind) -> list[Samples]:
    """Return the index of each tar. Raises UserError for a file that is not a tar or can't be read.

    kind: "files": every member is an image; "tars": every member is a tar of images; "shard": members with the same
    name and different extensions are a sample, an image and its label: a number in .cls, or "label" in .json.
    """
    with ThreadPoolExecutor(16) as pool:  # storage may have a high latency
        return list(pool.map(lambda tar: _indexed(tar, kind), tars))


def _indexed(tar: Path, kind: Kind) -> Samples:
    try:
        stat = tar.stat()
        stamp = json.dumps([VERSION, kind, stat.st_size, stat.st_mtime_ns])
        places = tar.with_name(f".{tar.name}.index.npz"), cache_folder() / "index" / f"{_digest(tar)}.npz"
        if (kept := _load(places, stamp, stat.st_size)) is not None:
            return kept
        with file_lock(tar):
            if (kept := _load(places, stamp, stat.st_size)) is not None:  # written by another process meanwhile
                return kept
            if stat.st_size > 20 << 30:  # takes minutes for ImageNet
                print(f"indexing {tar} (once)", file=sys.stderr, flush=True)
            samples = _scan(tar, kind)
            for place in places:
                with suppress(UserError), atomic_write(place) as temporary:  # the first may be in a read-only folder
                    _store(temporary, samples, stamp)
                    break
            return samples
    except OSError as error:
        raise from_os(error, f"reading {tar}") from error


def file_lock(path: Path) -> FileLock:
    """Return a lock between the processes of this machine, for work on a file that all of them use."""
    folder = Path(tempfile.gettempdir(), f"saccade-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder / f"{_digest(path)}.lock")


def cache_folder() -> Path:
    """Return the user's cache folder for saccade."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "saccade")


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]


def _store(path: Path, samples: Samples, stamp: str) -> None:
    beside = json.dumps([stamp, samples.incomplete, samples.truncated, samples.unused])
    arrays = dict(offsets=samples.offsets, sizes=samples.sizes, labels=samples.labels)
    names = dict(text=samples.names.text, ends=samples.names.ends)
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays, **names, beside=np.frombuffer(beside.encode(), np.uint8))


def _load(places: Sequence[Path], stamp: str, length: int) -> Samples | None:
    """Return an index that is kept in one of the places; None where none is whole and of the tar, of `length` bytes."""
    for place in places:
        with suppress(Exception), np.load(place, allow_pickle=False) as kept:  # missing or damaged: it will be rebuilt
            stamped, *rest = json.loads(kept["beside"].tobytes())
            if stamped == stamp:
                names = Strings(())
                names.text, names.ends = kept["text"], kept["ends"]
                samples = Samples(names, kept["offsets"], kept["sizes"], kept["labels"], *rest)
                lengths = {len(samples.offsets), len(samples.sizes), len(samples.labels), len(names)}
                low = min(samples.offsets.min(initial=0), samples.sizes.min(initial=0))
                if len(lengths) == 1 and low >= 0 and (samples.offsets + samples.sizes).max(initial=0) <= length:
                    return samples
    return None


def _scan(tar: Path, kind: Kind) -> Samples:
    """Index a tar in one pass over its headers."""
    with open(tar, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        members, truncated = _members(file, 0, size)
        if kind == "shard":
            return _group(file, members, truncated)
        if kind == "tars":
            inner = []
            for name, offset, length in members:
                found, ending = _members(file, offset, offset + length)
                inner += [(f"{name}/{member}", *place) for member, *place in found]
                truncated = truncated or (ending and f"{name} {ending}")
            members = inner
    names, offsets, sizes = zip(*members) if members else ((), (), ())
    places = np.array(offsets, np.int64), np.array(sizes, np.int64)
    return Samples(Strings(names), *places, np.full(len(names), -1, np.int64), {}, truncated, {})


def _members(file: io.BufferedReader, begin: int, end: int) -> tuple[list[tuple[str, int, int]], str]:
    """Return the files of a tar that is the range begin … end of a file, (name, offset in the file, size); and how it
    is truncated or damaged, or "".

    tarfile takes a damaged header for the end of the tar. A complete tar ends with a block of zeros.
    """
    found, position = [], begin
    try:
        with tarfile.open(fileobj=_Part(file, begin, end), mode="r:") as tar:
            for member in tar:
                tar.members = []  # free the members that it collects
                plain = member.isreg() and not member.issparse()  # what lies at its offset is the file itself
                data, length = begin + member.offset_data, member.size if plain else 0
                if length < 0 or begin + tar.offset <= position:  # else it could go on forever
                    return found, f"is damaged at {member.name}"
                if data + length > end:
                    return found, f"ends within {member.name}"
                position = begin + tar.offset
                if plain:
                    found.append((member.name, data, length))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:  # of damaged headers
        file.seek(begin)
        if not found and file.read(2) == b"\x1f\x8b":
            return found, "is compressed by gzip: decompress it with gunzip"
        return found, "is damaged" if found else f"is not a tar file ({error})"
    file.seek(position)
    block = file.read(min(tarfile.BLOCKSIZE, end - position))
    whole = block == bytes(tarfile.BLOCKSIZE)
    return found, "" if whole else f"ends too early, {'in a damaged header ' if block else ''}after {len(found)} files"


class _Part(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, file: io.BufferedReader, begin: int, end: int):
        self.file, self.begin, self.end, self.position = file, begin, end, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.end - self.begin}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.end - self.begin - self.position)
        self.file.seek(self.begin + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def key_and_ending(name: str) -> tuple[str, str]:
    """Split a shard member's name as webdataset does: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _group(file: io.BufferedReader, members: list[tuple[str, int, int]], truncated: str) -> Samples:
    """Return a shard's samples: an image and its label per key."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | None] = {}
    lost: dict[str, str] = {}
    others: list[tuple[str, str, str]] = []  # member, key, ending
    unused: Counter[str] = Counter()
    for name, offset, size in members:
        key, ending = key_and_ending(name)
        if name.rpartition("/")[2].startswith("."):  # macOS adds such files to tars
            unused["hidden"] += 1
        elif ending in IMAGE:
            if key in images:
                lost[f"{name} at byte {offset}"] = f"is a second image under the key {key}, after {images[key][0]}"
            else:
                images[key] = name, offset, size
        elif ending in ("cls", "json"):
            file.seek(offset)
            label = _label(file.read(size), ending)
            if label is None and ending == "json":
                others.append((name, key, ending))
            elif key in labels and labels[key] != label:
                lost[f"{name} at byte {offset}"] = f"is a second label, {label}, under the key {key}"
            else:
                labels[key] = label
        else:
            others.append((name, key, ending))
    whole = [key for key in images if labels.get(key) is not None]
    lost |= {images[key][0]: "has no label" for key in images if labels.get(key) is None}
    lost |= {key: "has a label but no image" for key in labels if key not in images}
    known = set(whole)
    for name, key, ending in others:
        if key in known:
            continue  # for example a caption or a depth map of the sample
        if ending.rpartition(".")[2] in IMAGE:  # the name has more than one dot
            lost[name] = f"has no label (its key is {key}: a key ends at the first dot)"
        else:
            unused[f".{ending}" if ending else "without extension"] += 1
    names, offsets, sizes = zip(*(images[key] for key in whole)) if whole else ((), (), ())
    places = np.array(offsets, np.int64), np.array(sizes, np.int64)
    numbers = np.array([labels[key] for key in whole], np.int64)
    return Samples(Strings(names), *places, numbers, lost, truncated, dict(unused))


def _label(text: bytes, ending: str) -> int | None:
    """Return the number in a .cls member, or the "label" of a .json member; None if it is not an integer."""
    try:
        label = text.decode("utf-8-sig").strip() if ending == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    number = str(label)  # "True" and "False" do not match below
    return int(number) if re.fullmatch(r"-?\d{1,9}", number, re.ASCII) else None


def fetch(url: str, folder: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """Download a stream ("pipe:aws s3 cp … -", "https://…") to a file in `folder`, unless it is already there.

    The processes of one machine download it once. size, sha256: expected values; others raise a UserError.
    """
    from webdataset.gopen import gopen

    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.tar"
    with file_lock(target):
        if target.exists() and size in (None, target.stat().st_size):
            return target
        with atomic_write(target) as temporary:
            try:
                stream = gopen(url, "rb")
                try:
                    with open(temporary, "wb") as file:
                        for piece in iter(lambda: stream.read(1 << 20), b""):
                            file.write(piece)
                finally:
                    stream.close()
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise from_os(error, f"fetching {url} to {folder}") from error
                raise UserError(f"{url} can't be fetched ({error})", DATA) from error
            if sha256 and checksum(temporary) != sha256:
                raise UserError(f"{url} gave {temporary.stat().st_size} bytes that do not match the index", DATA)
    return target


def expand(patterns: str | Sequence[str]) -> Iterator[str]:
    """Expand patterns into paths and streams: braces as in shells, and the wildcards * ? [] for local files.

    Raises UserError for an invalid pattern, a pattern that matches no file, and a file that does not exist.
    """
    from webdataset.shardlists import expand_urls

    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            names = expand_urls(pattern) if re.search(r"[{}$\\]|::", pattern) else [pattern]
        except ValueError as error:  # unbalanced braces, unset variables
            raise UserError(f"{pattern} is not a valid pattern of shards ({error})") from error
        for name in names:
            if is_stream(name):
                yield name
                continue
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            if not found:
                raise UserError(f"there is no shard {name}" + (f" (of {pattern})" if name != pattern else ""))
            yield from found


def is_stream(name: str) -> bool:
    """Return whether a shard's name is a webdataset stream, not a local file."""
    return name.startswith("pipe:") or "://" in name
