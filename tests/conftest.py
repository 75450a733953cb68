"""Fixtures of several folders."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("support")  # its assertions say what they compared, as those of tests do

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def double():
    """Make float64 the default dtype, in which golden values are compared."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def command(monkeypatch, capfd):
    """command("train", *arguments) -> (exit code, stdout, stderr) of a tool, run in this process."""

    from saccade.train.runtime.errors import run
    from support.runs import own_signals

    def call(tool: str, *arguments) -> tuple[int, str, str]:
        script = str(ROOT / f"tools/{tool}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        main = runpy.run_path(script)["main"]
        capfd.readouterr()
        with own_signals():
            try:
                code = run(main)
            except SystemExit as end:  # argparse's
                code = end.code
        return code, *capfd.readouterr()

    return call
