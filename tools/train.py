"""Train a model from a config file.

  python tools/train.py configs/digits/resnet18.py
  python tools/train.py configs/digits/resnet18.py optimizer.lr=5e-4 epochs=10 --run-dir runs/short
  python tools/train.py configs/digits/resnet18.py model.drop_path_rate=      without this key of the config
  python tools/train.py runs/short --resume
  python tools/train.py configs/digits/resnet18.py --print-config      every key, its value, type and meaning
  python tools/train.py configs/digits/resnet18.py --dry-run           one step: images, memory, time
  python tools/train.py configs/digits/resnet18.py patience=3 batch_size=auto profile=5
  torchrun --nproc_per_node=2 tools/train.py configs/digits/resnet18.py
  python tools/train.py configs/finetune/folder.py data.root=/path/to/images checkpoint=weights.safetensors

Exit codes: 0 done, 2 an error to fix (one sentence says what), 65 damaged data (more than data.max_bad samples), 69
another process was killed or did not answer, 70 the loss was not finite max_skipped times in a row, 74 a file could not
be written, 75 stopped by SIGTERM or SIGUSR1 and 130 by Ctrl-C, with everything saved (the same command
with --resume continues).
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "config",
        type=Path,
        help="a config file, which is code and is run, or the folder (or config.py) of an earlier run, which is read",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the config; values are Python literals"
    )
    parser.add_argument("--run-dir", type=Path, help="output folder (default: runs/ and the config's folder and name)")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    parser.add_argument("--overwrite", action="store_true", help="start again, removing the earlier run's files")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every key with its value, type and default, and train nothing",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build data and model, try one step, say what it takes, and write nothing",
    )
    parser.add_argument("--json", action="store_true", help="with --print-config: a JSON list of objects")
    args, unknown = parser.parse_known_intermixed_args()

    # Imported here, so that --help is fast.
    from saccade.train import engine
    from saccade.train.data.files import refuse_data_folder
    from saccade.train.runtime import config
    from saccade.train.runtime.distributed import process_group, sync_errors
    from saccade.train.runtime.errors import UserError, set_options
    from saccade.train.runtime.run_folder import is_run, removed_if_empty
    from saccade.train.trial import dry_run

    set_options(folder="--run-dir", resumes=True)
    path = args.config.expanduser()
    resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts
    with process_group():
        with sync_errors():
            if unknown:
                keys = engine.known_keys(config.load(path))
                raise UserError(config.option_hint(*option_and_value(unknown[0]), keys))
            if args.json and not args.print_config:
                raise UserError("--json goes with --print-config: a run's log.jsonl has its lines as JSON")
            settings = config.load(path, args.overrides)
            engine.validate(settings)
            if args.print_config:
                print_config(settings, args.json)
                return
            if args.dry_run:
                print("\n".join(dry_run(settings)))
                return
            folder = path if path.is_dir() else path.parent
            run_dir = args.run_dir and args.run_dir.expanduser()
            if run_dir is None and is_run(folder):  # an earlier run, to resume or overwrite in place
                run_dir = folder
            elif run_dir is None:
                run_dir = Path("runs", path.resolve().parent.name, path.stem)
            refuse_data_folder(run_dir, settings["data"])
        with removed_if_empty(run_dir):
            engine.prepare_folder(run_dir, resume, args.overwrite)
            engine.train(run_dir, resume, **settings)


def print_config(settings: dict, as_json: bool) -> None:
    """Print what `key=value` can set: a table for people, or JSON."""
    import json

    from rich.console import Console
    from rich.table import Table
    from saccade.train.keys import list_keys

    keys = list_keys(settings)
    if as_json:
        print(json.dumps([key._asdict() for key in keys], indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("key", "value", "default", "type", "what it does", box=None, pad_edge=False)
    for key in keys:
        changed = key.value is not None and key.value != key.default
        shown = (key.name, key.value or key.default, key.default if changed else "", key.type, key.help)
        table.add_row(*(text.replace("[", r"\[") for text in shown), style="bold" if changed else "dim")
    console.print(table)


def option_and_value(option: str) -> tuple[str, str]:
    """Return an unknown option ("--lr=1e-3", or "--lr" followed by "1e-3") and its value."""
    name, equals, value = option.partition("=")
    if not equals:
        after = sys.argv[sys.argv.index(option) + 1 :]
        value = after[0] if after and not after[0].startswith("--") else "…"
    return name, value


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
