"""Evaluate a trained model, write metrics.json (top1, top5 in percent, images, seconds), draw what it does.

  python tools/test.py runs/demo                                        the best weights of a finished run
  python tools/test.py runs/demo --checkpoint runs/demo/checkpoints/last.safetensors
  python tools/test.py configs/finetune/folder.py data.root=/path --checkpoint weights.pth --out results/
  torchrun --nproc_per_node=2 tools/test.py runs/demo

Exit codes as of tools/train.py.
"""

import argparse
import sys
from pathlib import Path

from saccade.train import config, engine
from saccade.train.distributed import processes, together
from saccade.train.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run, or a config file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the config; values are Python literals"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="weights to test: a file that timm loads, or a run's checkpoint"
    )
    parser.add_argument("--split", default="test", choices=["train", "val", "test"], help="images to test on")
    parser.add_argument("--out", type=Path, help="where to write (default: the run folder, or runs/test)")
    args = parser.parse_intermixed_args()
    run_dir = args.run if args.run.is_dir() else None
    with processes():
        with together():
            settings = config.load(run_dir / "config.py" if run_dir else args.run, args.overrides)
            engine.validate(settings)
            if args.checkpoint is None and not (run_dir and (run_dir / "model.safetensors").exists()):
                raise UserError(f"{args.run} has no finished model: give the weights with --checkpoint FILE")
        engine.test(run_dir, settings, args.checkpoint, args.split, args.out or run_dir or Path("runs/test"))


if __name__ == "__main__":
    sys.exit(run(main))
