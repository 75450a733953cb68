"""Sentences and exit codes."""

import errno

import pytest
from saccade.train.runtime.errors import UserError, closest, run


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("do this"), 2, "error: do this\n"),
        (UserError("saved", 75), 75, "stopped: saved\n"),
        (UserError("said elsewhere", 74, quiet=True), 74, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "log.txt"),
            74,
            "error: writing log.txt failed (No space left",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: writing x failed (Permission denied)"),
        (KeyboardInterrupt(), 130, "stopped from the keyboard"),
    ],
    ids=str,
)
def test_exit_codes(capsys, error, code, said):
    assert run(raising(error)) == code
    assert capsys.readouterr().err.startswith(said)


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
