"""Print a script that completes commands, options and names of configs in a shell.

  eval "$(saccade completion bash)"                        in ~/.bashrc
  saccade completion zsh > ~/.zfunc/_saccade               in a folder of zsh's fpath
  saccade completion tcsh > ~/.saccade.tcsh                and: source ~/.saccade.tcsh

The script is a snapshot: print it again after an update. It needs shtab: pip install 'saccade[completion]'. Exit codes:
0 done, 2 an error to fix.
"""

import argparse
import sys
from pathlib import Path

from . import MODULES, PROGRAMS, _file, _run, first_line
from .configs import list_configs

FUNCTION = "_saccade_configs"  # of bash: completes names of configs, and files


class _Parsed(BaseException):
    """Carries a command's parser out of it, instead of parsing."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def read_parser(command: str) -> argparse.ArgumentParser:
    """Return the argument parser of a command, which is started and left where it would parse."""

    def leave(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _Parsed(parser)

    methods = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in methods}
    argv, main, path = sys.argv, sys.modules["__main__"], list(sys.path)
    sys.argv = [f"saccade {command}", "--help"]  # programs that import much answer --help before
    try:
        for name in methods:
            setattr(argparse.ArgumentParser, name, leave)
        if command in PROGRAMS:
            _run(_file(command))
        else:
            sys.modules[f"{__package__}.{command}"].main()
    except _Parsed as parsed:
        return parsed.parser
    finally:
        for name, method in kept.items():
            setattr(argparse.ArgumentParser, name, method)
        sys.argv, sys.modules["__main__"], sys.path[:] = argv, main, path
    raise AssertionError(f"{command} parses no arguments")


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the whole command line: `saccade` and every command."""
    import importlib

    import shtab

    whole = argparse.ArgumentParser("saccade", description="Train, test and use the models of the zoo.")
    commands = whole.add_subparsers(dest="command")
    for name in [*PROGRAMS, *MODULES]:
        if name in MODULES:
            importlib.import_module(f".{name}", __package__)
        parser = read_parser(name)
        for action in parser._actions:
            if action.dest in ("config", "overrides"):
                action.complete = dict(bash=FUNCTION, zsh=f"({' '.join(list_configs())})")
            elif action.type is Path:
                action.complete = shtab.FILE
            action.help = action.help and action.help.replace("%(default)s", str(action.default))
        commands.add_parser(
            name.replace("_", "-"),
            parents=[parser],
            add_help=False,
            help=first_line(_file(name)),
            conflict_handler="resolve",
        )
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    args = parser.parse_args()
    try:
        import shtab
    except ImportError:
        print("error: saccade completion needs shtab: pip install 'saccade[completion]'", file=sys.stderr)
        return 2
    names = " ".join(list_configs())
    preamble = dict(bash=f'{FUNCTION}() {{\n  compgen -W \'{names}\' -- "$1"\n  compgen -f -- "$1"\n}}\n')
    print(shtab.complete(make_parser(), args.shell, preamble=preamble))
    return 0
