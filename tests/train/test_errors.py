"""Sentences and exit codes."""

import errno
import os
import sys

import pytest
from saccade.train.runtime.errors import UserError, closest, from_os, open_closed_streams, options, run, set_options


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("do this"), 2, "error: do this\n"),
        (UserError("saved", 75), 75, "stopped: saved\n"),
        (UserError("printed elsewhere", 74, quiet=True), 74, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "log.txt"),
            74,
            "error: writing log.txt failed (No space left",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "x"),
            2,
            "error: writing x failed (File exists): choose a folder",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: writing x failed (Permission denied)"),
        (UserError("saved", 130), 130, "stopped: saved\n"),
        (KeyboardInterrupt(), 130, "stopped: interrupted by Ctrl-C\n"),
        (KeyboardInterrupt("nothing was saved"), 130, "stopped: nothing was saved\n"),
    ],
    ids=str,
)
def test_exit_codes(capsys, error, code, message):
    assert run(raising(error)) == code
    assert capsys.readouterr().err.startswith(message)


def test_advice_is_of_the_command_that_runs(capsys):
    """A command without --resume or --run-dir does not advise them, and reading needs no space."""
    full, denied = OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "denied")
    assert str(from_os(full, "writing a")) == "writing a failed (full): free some space"
    assert str(from_os(denied, "writing a")) == "writing a failed (denied): choose a folder you can write to"
    assert str(from_os(denied, "reading a")).endswith("check the path and its permissions")
    assert str(from_os(OSError(errno.EIO, "bad"), "reading a")).endswith("check the disk")

    def main():
        set_options(checkpoint="--checkpoint FILE", folder="--out", resumes=True)
        assert options().checkpoint == "--checkpoint FILE"
        assert str(from_os(full, "writing a")).endswith("then continue with --resume")
        raise denied

    assert run(main) == 2 and "you can write to with --out" in capsys.readouterr().err
    assert options().checkpoint == "checkpoint=FILE"  # the next one begins anew


def test_success_and_bugs():
    assert run(lambda: None) == 0
    with pytest.raises(FileNotFoundError):  # a bug keeps its traceback
        run(raising(FileNotFoundError(errno.ENOENT, "no")))
    with pytest.raises(ValueError):
        run(raising(ValueError("no")))


def test_closest():
    assert closest("epoch", ["epochs", "seed"]) == ", did you mean epochs?"
    assert closest("zzz", ["b", "a"]) == ", there is a, b"
    assert closest("zzz", map(str, range(50))) == ""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(tmp_path, closed):
    """A process without stdin, stdout or stderr: files that it opens do not get what is printed."""
    child = os.fork()
    if child == 0:
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        open_closed_streams()
        with open(tmp_path / "file", "w") as file:
            os.write(1, b" ")
            file.write(str(file.fileno() > 2))
        sys.stdout.isatty()
        os._exit(run(raising(UserError("do this"))))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (tmp_path / "file").read_text() == "True"
