"""Find the image files in folders, and report what was skipped."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.distributed import rank
from ..runtime.errors import UserError
from ..runtime.run_folder import is_run

# Formats that Pillow registers but can't decode here, or only with the help of other programs.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
MANY = 12  # with this many classes or more, shares are summarised
HEIF = {".heic", ".heif", ".hif"}
# Folders that operating systems, archives and network drives add; names that begin with a dot are hidden too.
SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions, in lower case with the dot, of the files that Pillow can decode here."""
    try:
        from pillow_heif import register_heif_opener  # if it is installed, HEIC files can be read

        register_heif_opener()
    except ImportError:
        pass
    extensions = Image.registered_extensions().items()
    return frozenset(ending for ending, name in extensions if name not in NOT_DECODED)


def note(text: str) -> None:
    """Tell the user something about the data, once for all processes."""
    if rank() == 0:
        print(f"data: {text}", flush=True)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or is created by operating systems."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


class Skipped:
    """Count what a search of folders skips, to report it to the user."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()  # extensions of files that are not images
        self.hidden = 0
        self.runs: list[str] = []
        self.links: list[str] = []

    def add(self, other: "Skipped") -> None:
        """Add what another search skipped."""
        self.endings += other.endings
        self.hidden += other.hidden
        self.runs += other.runs
        self.links += other.links

    def report(self, folder: str | Path) -> None:
        """Tell the user what was skipped below `folder`, if anything."""
        parts = [f"{count} {ending or 'without extension'}" for ending, count in sorted(self.endings.items())]
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        lines = [f"skipped in {folder}: {', '.join(parts)}"] if parts else []
        if heif := sum(self.endings[ending] for ending in HEIF):
            lines.append(
                f"skipped {heif} HEIC {'file' if heif == 1 else 'files'}, which Pillow can't read here: "
                "convert to JPEG or pip install pillow-heif"
            )
        lines += [f"skipped run folder: {run}" for run in self.runs]
        lines += [f"skipped link to a folder that is searched anyway: {link}" for link in self.links]
        for line in lines:
            note(line)


def image_files(folder: str | Path, skipped: Skipped | None = None, root: str | Path | None = None) -> list[str]:
    """Return the image files below a folder, sorted, without hidden files, run folders and files that are not images.

    Links to folders are followed unless the target is searched anyway, that is a parent of the link or a folder within
    `root` (None: `folder`). skipped: counts what is skipped.
    """
    skipped = Skipped() if skipped is None else skipped
    extensions, images = image_extensions(), []
    try:
        for file in _files(str(folder), os.path.realpath(root or folder), skipped):
            name = os.path.basename(file)
            ending = os.path.splitext(name)[1].lower()
            if is_hidden(name):
                skipped.hidden += 1
            elif ending in extensions:
                images.append(file)
            else:
                skipped.endings[ending] += 1
    except OSError as error:
        raise UserError(f"{error.filename or folder} can't be read ({error.strerror})") from error
    return sorted(images)


def _files(folder: str, root: str, skipped: Skipped, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files below a folder. above: the real paths of its parents in the search."""
    real = os.path.realpath(folder)
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if not entry.is_dir():
            yield entry.path
        elif is_hidden(entry.name):
            skipped.hidden += 1
        elif entry.is_symlink() and _is_read_already(entry.path, root, (*above, real)):
            skipped.links.append(entry.path)
        elif is_run(Path(entry.path)):
            skipped.runs.append(entry.path)
        else:
            yield from _files(entry.path, root, skipped, (*above, real))


def _is_read_already(link: str, root: str, above: Iterable[str]) -> bool:
    """Return whether a link points into `root` or a folder of `above`, or to a parent of any of them."""
    target = os.path.realpath(link)
    return any(_is_within(target, folder) or _is_within(folder, target) for folder in (root, *above))


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means: "train", "val" or "test" for Training, valid, test_set, …; or
    None."""
    word = re.sub(r"[^a-z]", "", name.lower())
    word = re.sub(r"(?<=.)(set|data|split|images|imgs)$", "", word)
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def split_folders(folder: Path, accept: Iterable[str] | None = None) -> dict[str, Path]:
    """Return the folders of train, val and test below a folder, by split. Letter case and usual synonyms are accepted.

    accept: names of folders to consider; None: all. Raises UserError if two folders mean the same split, or val or test
    is a link to train.
    """
    folders: dict[str, Path] = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        split = split_of(path.name)
        if split is None or not path.is_dir() or (accept is not None and path.name not in accept):
            continue
        if split in folders:
            raise UserError(f"{folders[split]} and {path} are both {split} splits: leave one of them in {folder}")
        folders[split] = path
    for split, path in folders.items():
        if split != "train" and "train" in folders and path.samefile(folders["train"]):
            raise UserError(
                f"{path} and {folders['train']} are the same folder, by a link: give {split} its own images"
            )
    return folders


def refuse_data_folder(run_dir: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError if the images that a run writes to its folder would later be read as data.

    data: the config's section. Its `type` may have scanned(**arguments), which returns the folders it reads entirely.
    """
    if data.get("root") is None or is_run(run_dir):  # run folders are skipped
        return
    scanned = getattr(data["type"], "scanned", None)
    for folder in scanned(**{key: value for key, value in data.items() if key != "type"}) if scanned else ():
        if _is_within(os.path.realpath(run_dir), os.path.realpath(folder)):
            raise UserError(
                f"--run-dir {run_dir} is inside {folder}, whose images are all data: choose a folder elsewhere"
            )


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror})") from error


def note_classes(
    split: str, counts: Iterable[int], names: Iterable[str], unit: str, least: int, hint: str = ""
) -> None:
    """Tell the user each class's share of a split, and which classes have none.

    counts: per class of `names`, in `unit`. hint: added to the message if a class has none.
    Raises UserError if fewer than `least` (0, 1 or 2) classes have any, since there is nothing to learn.
    """
    counts, names = [int(count) for count in counts], list(names)
    if split == "train":
        for alike in look_alikes(names):
            note(f"classes whose names look alike: {', '.join(map(repr, alike))}; are they one class?")
    total = sum(counts)
    absent = [name for name, count in zip(names, counts) if not count]
    because = f" ({hint})" if hint else ""
    if least and not total:
        raise UserError(f"the {split} split has no {unit} of any class: there is nothing to learn{because}")
    if least > 1 and len(absent) == len(names) - 1 > 0:
        only = next(name for name, count in zip(names, counts) if count)
        raise UserError(
            f"the {split} split has {unit} of only one class, {only}, and none of {first(absent)}: "
            f"there is nothing to distinguish{because}",
        )
    if total and len(names) <= MANY:
        shares = ", ".join(f"{name} {100 * count / total:.3g} %" for name, count in zip(names, counts))
        note(f"{split}: {total:,} {unit}, {shares}")
    elif total:
        note(
            f"{split}: {total:,} {unit} of {len(names) - len(absent)} classes, {min(counts):,} to {max(counts):,} each"
        )
    if absent:
        note(f"{split} has no {unit} of {first(absent)}{because}")


def fold(name: str) -> str:
    """Return a name without what is easily overlooked: letter case, Unicode form, and the amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of different names that are equal when folded."""
    groups = defaultdict(list)
    for name in names:
        groups[fold(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def first(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def sample_names(dataset: Any, keys: Sequence[tuple[int, ...]]) -> list[str]:
    """Return a name for each image of a batch, given by the loader's keys: its file's, or "image INDEX"."""
    name = getattr(dataset, "filename", "image {}".format)
    return [name(key[1]) for key in keys]
