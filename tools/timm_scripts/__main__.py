"""Run one of timm's own scripts with saccade's models registered.

  python -m saccade.timm /path/to/pytorch-image-models/train.py /data/imagenet --model biformer_t …
  python -m saccade.timm /path/to/pytorch-image-models/validate.py /data/imagenet --model biformer_t --checkpoint FILE
  torchrun --nproc_per_node=8 -m saccade.timm /path/to/pytorch-image-models/train.py …

Without this, timm's scripts only know timm's own models. Everything else about them is unchanged.
"""

import os
import runpy
import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__.strip())
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(
            f"error: script {script} does not exist: give the path of timm's train.py, validate.py, benchmark.py, …"
        )
    import saccade.backbones  # noqa: F401  (registers)

    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as when Python runs the script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
