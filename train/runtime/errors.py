"""Errors that a user can fix: one sentence that says what to do, and an exit code.

0    done
2    an error in the configuration, data, files or permissions
65   bad data: more images that can't be read, or samples missing from truncated shards, than data.max_bad allows
69   another process of the job was killed, or did not answer within `timeout`
70   the loss or gradients were not finite in max_skipped steps in a row; the last good checkpoint is kept
74   a file could not be written or read (disk full, quota, I/O error); earlier checkpoints are intact
75   stopped by SIGTERM or SIGUSR1 after saving: the same command with --resume continues
130  interrupted by Ctrl-C; training has saved a checkpoint, unless Ctrl-C was pressed twice
141  the reader of the output has closed it (`| head`)
"""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

USER, DATA, LOST, NUMBERS, IO, PREEMPTED, INTERRUPTED, PIPE = 2, 65, 69, 70, 74, 75, 130, 141

_DEVICE_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_PERMISSION_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class UserError(Exception):
    """One sentence for the user and the exit code to end with; `quiet` where another process prints it."""

    def __init__(self, sentence: str, code: int = USER, quiet: bool = False):
        super().__init__(sentence)
        self.code, self.quiet = code, quiet


class Options(NamedTuple):
    """How the command that runs spells what messages advise. checkpoint: where weights are given; device: how to take
    the CPU; folder: the option of the folder that it writes, if it has one; resumes: whether it has --resume."""

    checkpoint: str = "checkpoint=FILE"
    device: str = "device=cpu"
    folder: str | None = None
    resumes: bool = False


_options = Options()


def set_options(**options: Any) -> None:
    """Set how messages spell the options of the command that runs, see Options; `run` undoes it."""
    global _options
    _options = Options(**options)


def options() -> Options:
    """Return how the command that runs spells its options; from Python, where there is none, the defaults."""
    return _options


def from_os(error: OSError, doing: str) -> UserError:
    """Return the UserError for an OSError raised while `doing` ("saving runs/x/last.safetensors")."""
    reason = error.strerror or str(error)
    failed, on_device = f"{doing} failed ({reason})", error.errno in _DEVICE_ERRNO
    if doing.startswith("reading"):
        advice = "check the disk" if on_device else "check the path and its permissions"
    elif on_device:
        advice = "free some space, then continue with --resume" if _options.resumes else "free some space"
    else:
        advice = f"choose a folder you can write to{f' with {_options.folder}' if _options.folder else ''}"
    return UserError(f"{failed}: {advice}", IO if on_device else USER)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without an end mark; its type where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def closest(name: str, names: Iterable[str]) -> str:
    """Return ', did you mean a or b?' with the names closest to `name`, else ', there is …' with all names."""
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f", did you mean {' or '.join(near)}?"
    return f", there is {', '.join(names)}" if 0 < len(names) <= 30 else ""


def open_closed_streams() -> None:
    """Open /dev/null in the place of a closed stdin, stdout or stderr (`>&-`, some daemons).

    Python has None for them, and the next file that is opened would get whatever a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (for the process)


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the process's exit code. A UserError is printed on stderr, without a traceback."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files that are no text, and terminals without UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if not error.quiet:
            prefix = "stopped" if error.code in (PREEMPTED, INTERRUPTED) else "error"
            print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.code
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except OSError as error:
        if error.errno not in _DEVICE_ERRNO | _PERMISSION_ERRNO:
            raise
        unreadable = error.filename and os.path.exists(error.filename) and not os.access(error.filename, os.R_OK)
        problem = from_os(error, f"{'reading' if unreadable else 'writing'} {error.filename or 'a file'}")
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return problem.code
    except KeyboardInterrupt as error:
        print(f"stopped: {str(error) or 'interrupted by Ctrl-C'}", file=sys.stderr, flush=True)
        return INTERRUPTED
    finally:
        set_options()
    return 0
