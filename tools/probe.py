"""Probe a frozen backbone's features with a linear classifier or k-NN. Writes metrics.json (top1, top5 in percent, …).

  python tools/probe.py configs/finetune/knn.py data.root=/path/to/images checkpoint=weights.safetensors
  python tools/probe.py configs/finetune/linear_probe.py data.root=/path checkpoint=runs/demo --out runs/probe
  torchrun --nproc_per_node=2 tools/probe.py configs/finetune/knn.py data.root=/path checkpoint=weights.pth

Exit codes: as in tools/train.py.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config file with a `probe` section, which is code and is run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the config; values are Python literals"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: runs/ and the config's folder and name)")
    args = parser.parse_intermixed_args()

    from saccade.train import probe
    from saccade.train.runtime import config
    from saccade.train.runtime.distributed import process_group, sync_errors
    from saccade.train.runtime.errors import set_options

    set_options(folder="--out")
    out = args.out or Path("runs", args.config.resolve().parent.name, args.config.stem)
    with process_group():
        with sync_errors():
            settings = config.load(args.config, args.overrides)
            probe.validate(settings)
        probe.run(out, **settings)


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
