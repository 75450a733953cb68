"""What a user is told when a run can't go on: one sentence that says what to do, and an exit code.

0    done
2    the user's to mend: configuration, data, files, permissions, a loss that is not finite
65   bad data: more images that can't be read, or samples missing from torn shards, than data.max_bad allows
74   a file could not be written or read (disk full, quota, I/O error); earlier checkpoints are intact
75   stopped by SIGTERM or SIGUSR1 after saving: the same command with --resume continues
130  stopped from the keyboard
141  whoever read the output has gone (`| head`)
"""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

USER, DATA, IO, PREEMPTED, INTERRUPTED, PIPE = 2, 65, 74, 75, 130, 141

_DEVICE_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_PERMISSION_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class UserError(Exception):
    """One sentence for the user and the exit code to end with; `quiet` where another process has said it already."""

    def __init__(self, sentence: str, code: int = USER, quiet: bool = False):
        super().__init__(sentence)
        self.code, self.quiet = code, quiet


def from_os(error: OSError, doing: str) -> UserError:
    """The sentence for an OSError met while `doing` ("saving runs/x/last.safetensors")."""
    reason = error.strerror or str(error)
    if error.errno in _DEVICE_ERRNO:
        return UserError(f"{doing} failed ({reason}): free some space, then go on with --resume", IO)
    return UserError(f"{doing} failed ({reason}): choose a place you can write to with --run-dir")


def closest(name: str, names: Iterable[str]) -> str:
    """', did you mean a or b?' for the names most like `name`, or what there is where none is alike."""
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f", did you mean {' or '.join(near)}?"
    return f", there is {', '.join(names)}" if 0 < len(names) <= 30 else ""


def run(main: Callable[[], None]) -> int:
    """Call `main`; return the process's exit code. A UserError ends as one sentence on stderr, without a traceback."""
    try:
        main()
    except UserError as error:
        if not error.quiet:
            print(f"{'stopped' if error.code == PREEMPTED else 'error'}: {error}", file=sys.stderr, flush=True)
        return error.code
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except OSError as error:
        if error.errno not in _DEVICE_ERRNO | _PERMISSION_ERRNO:
            raise
        problem = from_os(error, f"writing {error.filename or 'a file'}")
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return problem.code
    except KeyboardInterrupt:
        print("stopped from the keyboard: --resume continues from the last checkpoint", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0
