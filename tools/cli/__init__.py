"""The command `saccade`: train, test and use the models of the zoo.

  saccade configs biformer                           the configs whose names have this word
  saccade train digits/biformer_t epochs=4           a config of the package by its name, or a file of yours
  torchrun --nproc_per_node=8 -m saccade.cli train imagenet/biformer_s data.root=/data/imagenet
  saccade predict runs/digits/biformer_t photo.png
  saccade doctor                                     what is installed, and what is missing for what
  eval "$(saccade completion bash)"                  commands, options and configs by the tab key

`saccade COMMAND --help` describes a command. Exit codes: 0 done, 2 an error to fix (one sentence says what), 65 damaged
data, 74 a file could not be written, 75 and 130 stopped with everything saved, 141 the reader of the output has closed
it. Output has colours on a terminal only, and none where NO_COLOR is set.
"""

import ast
import difflib
import importlib.util
import sys
import types
from importlib.metadata import version
from pathlib import Path

# The commands, in the order of the help: a file of tools/ or a module of this package.
PROGRAMS = ["train", "test", "predict", "probe", "compare", "convert", "publish", "export", "shard"]
PROGRAMS += ["benchmark", "explain"]
MODULES = ["configs", "zoo", "doctor", "completion"]


def _tools() -> Path:
    """Return the folder of the programs: saccade/tools where saccade is installed, tools/ in a checkout."""
    spec = importlib.util.find_spec("saccade.tools")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _file(command: str) -> Path:
    return _tools() / f"{command}.py" if command in PROGRAMS else Path(__file__).with_name(f"{command}.py")


def first_line(file: Path) -> str:
    """Return the first line of a file's docstring, without importing it."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def _help() -> str:
    lines = [f"  {name.replace('_', '-'):<16} {first_line(_file(name))}" for name in [*PROGRAMS, *MODULES]]
    return "\n".join(["usage: saccade COMMAND …", "", __doc__.strip(), "", "commands:", *lines])


def _run(file: Path) -> None:
    """Run a file as `python FILE` does; runpy would replace the name of the program in its help."""
    program = types.ModuleType("__main__")
    program.__file__ = str(file)
    sys.modules["__main__"] = program  # where processes that it starts look for its functions
    sys.path.insert(0, str(file.parent))
    exec(compile(file.read_text(), str(file), "exec"), program.__dict__)


def main() -> None:
    """Run the command that the arguments name, as its own program: its help, its output, its exit code."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return
    if command == "--version":
        print(f"saccade {version('saccade')}")
        return
    name = command.replace("-", "_")
    if name not in PROGRAMS + MODULES:
        near = difflib.get_close_matches(command, [known.replace("_", "-") for known in PROGRAMS + MODULES], n=1)
        hint = f", did you mean {near[0]}?" if near else ": `saccade --help` lists them"
        print(f"error: there is no command {command}{hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"saccade {command}", *arguments]
    if name in PROGRAMS:
        _run(_file(name))
        return
    module = importlib.import_module(f".{name}", __name__)
    raise SystemExit(module.main())
