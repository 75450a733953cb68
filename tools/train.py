"""Train a model as a config file says.

  python tools/train.py configs/digits/resnet18.py
  python tools/train.py configs/digits/resnet18.py optimizer.lr=5e-4 epochs=10 --run-dir runs/short
  torchrun --nproc_per_node=2 tools/train.py configs/digits/resnet18.py
  python tools/train.py configs/finetune/folder.py data.root=/path/to/images checkpoint=weights.safetensors

Exit codes: 0 done, 2 something to mend (one sentence says what), 65 data that are damaged (more than data.max_bad
samples), 74 a file could not be written,
75 stopped by SIGTERM or SIGUSR1 with everything saved (the same command with --resume goes on).
"""

import argparse
import os
import sys
from pathlib import Path

from saccade.train import engine
from saccade.train.runtime import config
from saccade.train.runtime.distributed import process_group, sync_errors
from saccade.train.runtime.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config file, or the config.py of an earlier run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the config; values are Python literals"
    )
    parser.add_argument("--run-dir", type=Path, help="where to write (default: runs/ and the config's folder and name)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint, if it has one"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, removing the earlier run's files")
    args = parser.parse_intermixed_args()
    run_dir = args.run_dir or Path("runs", args.config.resolve().parent.name, args.config.stem)
    resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts
    with process_group():
        with sync_errors():
            settings = config.load(args.config, args.overrides)
            engine.validate(settings)
        engine.prepare_folder(run_dir, resume, args.overwrite)
        engine.train(run_dir, resume, **settings)


if __name__ == "__main__":
    sys.exit(run(main))
