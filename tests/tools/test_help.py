"""Every tool's --help answers without the imports that take seconds, and writes nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import contextlib, io, runpy, sys
from pathlib import Path
for tool in sorted(Path(sys.argv[1]).glob("*.py")):
    text = tool.read_text()
    if "argparse" not in text:
        continue
    sys.argv = [str(tool), "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(tool), run_name="__main__")
        print(tool.name, "does not end")
    except SystemExit as end:
        loaded = {"torch", "timm", "matplotlib", "sklearn"} & sys.modules.keys()
        if end.code or loaded or "usage: " not in out.getvalue():
            print(tool.name, end.code, loaded)
"""


def test_help(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "tools")], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
