"""Show what the attention of a model did with an image: overlays, an animation over the layers, and numbers.

  saccade explain biformer_t photo.jpg --query 120,80 --out explained
  saccade explain runs/demo digit.png --layer stages.2.blocks.0 --head 1
  saccade explain sparsifiner_deit_t photo.jpg --method rollout --gif
  saccade explain runs/demo digit.png --method gradcam
  saccade explain davit_t --list
  saccade explain runs/demo biformer_t --serve

A model by its name has untrained weights, unless --checkpoint or --pretrained gives it others. OUT/overview.png shows
four layers. Each map is an overlay OUT/LAYER_KIND.png and an array of OUT/maps.npz; OUT/explained.json describes them.
Exit codes: 0 done, 2 an error to fix; then nothing is written.
"""

import argparse
import sys
from pathlib import Path


def pair(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y, such as 120,80, got {text}") from None
    return x, y


def head(text: str) -> int | None:
    if text == "mean":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be the number of a head or mean, got {text}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a finished run, or a model's name")
    parser.add_argument("image", nargs="*", help="an image file (with --serve: more models to choose from)")
    parser.add_argument("--layer", help="a layer, or LAYER:KIND, as --list names them (default: all)")
    parser.add_argument("--head", type=head, help="the number of a head, or mean (default)")
    parser.add_argument(
        "--query", type=pair, metavar="X,Y", help="in pixels of the image (default: the class token or the middle)"
    )
    parser.add_argument("--out", type=Path, default=Path("explained"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--method", default="attention", help="attention (default), rollout over layers, or gradcam of the prediction"
    )
    parser.add_argument("--target", type=int, help="gradcam: the number of the class (default: the predicted one)")
    parser.add_argument("--gif", action="store_true", help="also write layers.gif, an animation over the layers")
    parser.add_argument("--list", action="store_true", help="print the model's layers")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--checkpoint", type=Path, help="weights for a model's name")
    parser.add_argument("--pretrained", action="store_true", help="the weights that timm publishes")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--serve", action="store_true", help="a page in the browser, instead of files")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    args = parser.parse_args()

    from saccade.train.runtime.errors import UserError, set_options

    set_options(checkpoint="--checkpoint FILE", device="--device cpu", folder="--out")
    if args.serve:
        if args.pretrained:
            raise UserError("--pretrained does not apply to --serve: give the weights with --checkpoint FILE")
        from saccade.explain.page import serve

        serve([args.model, *args.image], args.host, args.port, args.checkpoint, args.device)
        return
    if len(args.image) > 1:
        raise UserError(f"one image at a time, got {len(args.image)}")
    from saccade.explain.files import run

    run(
        args.model, Path(args.image[0]) if args.image else None, args.layer, args.head, args.query, args.out,
        args.method, args.target, args.gif, args.list, args.json, args.checkpoint, args.pretrained, args.device,
    )  # fmt: skip


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
