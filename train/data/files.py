"""Find the image files in people's folders, and say what was passed over."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.distributed import rank
from ..runtime.errors import DATA, UserError
from ..runtime.run_folder import is_run

# Pillow registers these formats without being able to decode them here, or with other programs' help only.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
MANY = 12  # classes from which on a line has no room for each share
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
    """Return the endings, in lower case with the dot, of the files that Pillow can decode here."""
    try:
        from pillow_heif import register_heif_opener  # where it is installed, HEIC files are images too

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
    """Whether a file or folder is hidden, or one that a system made for itself."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


class Skipped:
    """Count what a search of folders passes over, for one line to the user."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()  # of files that are no images
        self.hidden = 0
        self.runs: list[str] = []
        self.links: list[str] = []

    def add(self, other: "Skipped") -> None:
        """Count what another search passed over too."""
        self.endings += other.endings
        self.hidden += other.hidden
        self.runs += other.runs
        self.links += other.links

    def report(self, folder: str | Path) -> None:
        """Tell the user what was passed over below `folder`, if anything was."""
        parts = [f"{count} {ending or 'without an ending'}" for ending, count in sorted(self.endings.items())]
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        lines = [f"passed over in {folder}: {', '.join(parts)}"] if parts else []
        if heif := sum(self.endings[ending] for ending in HEIF):
            lines.append(
                f"{heif} HEIC {'file was' if heif == 1 else 'files were'} passed over, which Pillow can't read here: "
                "convert to JPEG or pip install pillow-heif"
            )
        lines += [f"passed over, being the folder of a run: {run}" for run in self.runs]
        lines += [f"not followed, being a link to a folder that is read already: {link}" for link in self.links]
        for line in lines:
            note(line)


def image_files(folder: str | Path, skipped: Skipped | None = None, root: str | Path | None = None) -> list[str]:
    """Return the image files below a folder, sorted; hidden ones, run folders and files that are no images left out.

    Links to folders are followed, unless they lead to a folder that is read anyway: one that holds them, or one within
    `root` (None: `folder`). skipped: where what is left out is counted.
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
    """Yield the files below a folder. above: the real paths of the folders that the search came through."""
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
    """Whether a link leads into `root` or a folder of `above`, or to one that holds any of them."""
    target = os.path.realpath(link)
    return any(_is_within(target, folder) or _is_within(folder, target) for folder in (root, *above))


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" for a folder's name that means one: Training, valid, test_set, train2017, …"""
    word = re.sub(r"[^a-z]", "", name.lower())
    word = re.sub(r"(?<=.)(set|data|split|images|imgs)$", "", word)
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def split_folders(folder: Path, accept: Iterable[str] | None = None) -> dict[str, Path]:
    """Return the folders of train, val and test below a folder, by split; any letter case and the usual synonyms do.

    accept: the names of folders that are considered; None: all. Raises UserError where two mean the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        split = split_of(path.name)
        if split is None or not path.is_dir() or (accept is not None and path.name not in accept):
            continue
        if split in found:
            raise UserError(f"{found[split]} and {path} are both {split} splits: leave one of them in {folder}", DATA)
        found[split] = path
    return found


def refuse_data_folder(run_dir: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError for a run folder where its images would be taken for data.

    data: the config's section, whose `type` may say with scanned(**arguments) which folders it reads all images of.
    """
    if data.get("root") is None or is_run(run_dir):  # the folders of runs are passed over
        return
    scanned = getattr(data["type"], "scanned", None)
    for folder in scanned(**{key: value for key, value in data.items() if key != "type"}) if scanned else ():
        if _is_within(os.path.realpath(run_dir), os.path.realpath(folder)):
            raise UserError(
                f"--run-dir {run_dir} lies in {folder}, all of whose images are data: choose a folder elsewhere"
            )


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors put first."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8", DATA) from error
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror})") from error


def note_classes(
    split: str, counts: Iterable[int], names: Iterable[str], unit: str, least: int, hint: str = ""
) -> None:
    """Tell the user how much of a split each class has, and which classes have nothing.

    counts: of the classes `names`, in `unit`. hint: what to add where a class has nothing.
    Raises UserError where fewer classes than `least` (0, 1 or 2) have something: there is nothing to learn.
    """
    counts, names = [int(count) for count in counts], list(names)
    total = sum(counts)
    absent = [name for name, count in zip(names, counts) if not count]
    because = f" ({hint})" if hint else ""
    if least and not total:
        raise UserError(f"the {split} split has no {unit} of any class: there is nothing to learn{because}", DATA)
    if least > 1 and len(absent) == len(names) - 1 > 0:
        only = next(name for name, count in zip(names, counts) if count)
        raise UserError(
            f"the {split} split has {unit} of the class {only} alone, none of {first(absent)}: "
            f"there is nothing to tell apart{because}",
            DATA,
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


def first(names: list[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
