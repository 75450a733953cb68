"""Images that can't be read, and samples missing from truncated shards: listed, counted, and tolerated up to a
budget."""

import re
from pathlib import Path
from typing import Any

from ..runtime.checkpoint import write_text
from ..runtime.distributed import all_gather_object, rank, sync_errors
from ..runtime.errors import DATA, UserError


class BadImage(UserError):
    """An image that can't be read: its name (a file, or tar!member) and the reason. The loader may continue without
    it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{printable(name)} {reason}: repair or remove it", DATA)
        self.name, self.reason = printable(name), reason

    def __reduce__(self) -> tuple:  # picklable, to pass between processes
        return BadImage, (self.name, self.reason)


def printable(name: str) -> str:
    """Escape the control characters and undecodable bytes in a file's name, for terminals and text files."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: repr(match[0])[1:-1], name)


class BadImages:
    """The unreadable or missing samples of a run, over all processes, compared with a budget.

    file: where process 0 lists them, one per line: number of samples, name and reason, separated by tabs; with
    `resume`, the samples it lists are counted. source: the data, with the budget `max_bad` and, in `bad`, the samples
    found missing before any image was read.
    """

    def __init__(self, file: Path, source: Any, resume: bool = False):
        self.file, self.budget = file, getattr(source, "max_bad", 0)
        self.known: dict[str, tuple[str, int]] = {}  # name -> (reason, samples), identical in all processes
        self.new: dict[str, tuple[str, int]] = {}  # found by this process since the last `share`
        if resume and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                count, name, reason = line.split("\t")
                self.new[name] = reason, int(count)  # other machines may not have the file
        self.note(getattr(source, "bad", {}))

    def note(self, bad: dict[str, tuple[str, int]]) -> None:
        """Record what this process could not read, name -> (reason, samples). Known names are ignored."""
        entries = {printable(name): (printable(reason), samples) for name, (reason, samples) in bad.items()}
        self.new |= {name: entry for name, entry in entries.items() if name not in self.known}

    def share(self) -> None:
        """Exchange what the processes have recorded. All must call it. Raises UserError (code 65) beyond the budget."""
        for entries in all_gather_object(self.new):
            self.known |= {name: entry for name, entry in entries.items() if name not in self.known}
        self.new = {}
        if not self.known:
            return
        with sync_errors():
            if rank() == 0:
                lines = [f"{count}\t{name}\t{reason}\n" for name, (reason, count) in self.known.items()]
                write_text(self.file, "".join(lines))
        count = sum(count for _, count in self.known.values())
        if count > self.budget:
            first = [f"{name} {reason}" for name, (reason, _) in self.known.items()][:3]
            more = f" and {len(self.known) - 3} more" if len(self.known) > 3 else ""
            it = "it" if count == 1 else "them"
            raise UserError(
                f"{', '.join(first)}{more}: repair or remove {it}, or allow for {it} "
                f"(data.max_bad={self.budget} is less than {count})",
                DATA,
                quiet=rank() > 0,
            )
