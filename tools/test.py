"""Evaluate a trained model, write metrics.json (top1, top5, ece in percent, images, seconds, …), draw what it does.

  python tools/test.py runs/demo                                        the best weights of a finished run
  python tools/test.py runs/demo --checkpoint runs/demo/checkpoints/last.safetensors
  python tools/test.py configs/finetune/folder.py data.root=/path --checkpoint weights.pth --out results/
  python tools/test.py runs/demo data.root=/other --class-map names.json  data whose classes have other names
  python tools/test.py runs/demo --images imagenetv2-matched-frequency    another folder; see docs/evaluate.md
  python tools/test.py configs/finetune/folder.py model.name=resnet18 model.pretrained=True --images imagenet/val
  python tools/test.py runs/demo --json | jq .top1                        metrics.json on standard output
  torchrun --nproc_per_node=2 tools/test.py runs/demo

Exit codes as of tools/train.py.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder, or a config, which is code and is run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the config; values are Python literals"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="weights to test: a file that timm loads, a run's checkpoint or a run's folder"
    )
    parser.add_argument("--split", default="test", choices=["train", "val", "test"], help="images to test on")
    parser.add_argument("--images", type=Path, help="a folder of class folders to test on in place of the split")
    parser.add_argument(
        "--class-map", type=Path, metavar="FILE", help='JSON, {"class of the data": "class of the model", …}'
    )
    parser.add_argument("--real", metavar="FILE", help="ReaL labels of ImageNet's val: real.json, or timm for its copy")
    parser.add_argument("--img-size", type=int, help="pixels a side (default: data.img_size, or the model's own)")
    parser.add_argument("--crop-pct", type=float, help="share of a side that the center crop keeps (the model's own)")
    parser.add_argument(
        "--interpolation", choices=["bilinear", "bicubic", "nearest", "lanczos"], help="of resizing (the model's own)"
    )
    parser.add_argument("--json", action="store_true", help="print the content of metrics.json, and nothing else")
    parser.add_argument("--out", type=Path, help="where to write (default: the run folder, or runs/test)")
    args = parser.parse_intermixed_args()

    from saccade.train import engine
    from saccade.train.data.test_folder import TestFolder
    from saccade.train.models.class_names import read_class_map
    from saccade.train.models.published import read_published
    from saccade.train.runtime import config
    from saccade.train.runtime.distributed import process_group, sync_errors
    from saccade.train.runtime.errors import UserError, set_options
    from saccade.train.test import model_class_names, test
    from timm.data import ImageNetInfo

    set_options(checkpoint="--checkpoint FILE", folder="--out")
    run_dir = args.run if args.run.is_dir() else None
    with process_group():
        with sync_errors():
            if args.img_size is not None and args.img_size < 1:
                raise UserError(f"--img-size must be 1 or more pixels, got {args.img_size}")
            if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
                raise UserError(f"--crop-pct must be a share above 0, up to 1, got {args.crop_pct:g}")
            if ignored := [text for text in args.overrides if text.startswith("checkpoint=")]:
                raise UserError(f"{ignored[0]} is what training begins with: test weights with --checkpoint FILE")
            settings = config.load(run_dir / "config.py" if run_dir else args.run, args.overrides)
            class_map = read_class_map(args.class_map) if args.class_map else None
            checkpoint = read_published(args.checkpoint) if args.checkpoint else None
            if args.img_size is not None:
                settings["data"]["img_size"] = args.img_size
            if args.images is not None:
                names = model_class_names(None, run_dir, settings, checkpoint, class_map)
                names = names or ImageNetInfo().label_names()
                kept = {key: settings["data"][key] for key in ("img_size", "max_bad") if key in settings["data"]}
                settings["data"] = dict(type=TestFolder, root=str(args.images), class_names=names, **kept)
            engine.validate(settings)
            if settings["batch_size"] == "auto":
                raise UserError("batch_size=auto is for training: give a number of images with batch_size=…")
            finished = run_dir is not None and (run_dir / "model.safetensors").exists()
            if checkpoint is None and not finished and (run_dir or not settings["model"].get("pretrained")):
                raise UserError(f"{args.run} has no finished model: give the weights with --checkpoint FILE")
        own = dict(crop_pct=args.crop_pct, interpolation=args.interpolation)
        changed = {key: value for key, value in own.items() if value is not None}
        out = args.out or run_dir or Path("runs/test")
        test(run_dir, settings, checkpoint, args.split, out, args.real, changed, class_map, args.json)


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
