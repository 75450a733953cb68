"""Convert between the authors' weight files, saccade's and OpenMMLab's.

  saccade convert published.pth biformer_s.safetensors --model biformer_s      the authors' file as ours
  saccade convert published.pth b.safetensors --model biformer_t num_classes=10
  saccade convert biformer_s.safetensors back.pth --to published               and back, under the authors' keys
  saccade convert runs/pets back.pth --to published --like published.pth       a trained model under the authors' keys
  saccade convert runs/scenes/mask_rcnn_biformer_t detector.pth --to openmmlab

saccade (the default): safetensors that timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=OUT))
reads; its metadata say where the weights come from (file, sha256, date, licence). published: the authors' keys, as the
file had them. openmmlab: a checkpoint of mmdet or mmseg and, beside it, its config (detector.py), for their tools as
they are: init_detector("detector.py", "detector.pth"); a classifier's file has its backbone, for load_from= in their
configs. The backbone is the SaccadeBackbone of saccade.integrations.mmdet, so saccade must be installed there, too.

Weights are read without running code. What does not fit is refused with the list of keys. Files are never replaced.
Exit codes: 0 done, 2 an error to fix (one sentence says what), 74 a file could not be written.
"""

import argparse
import ast
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="a file of weights, or the folder of a finished run")
    parser.add_argument("out", type=Path, help="the file to write: .safetensors, or .pth (published, openmmlab)")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the model, such as num_classes")
    parser.add_argument("--to", choices=["saccade", "published", "openmmlab"], default="saccade", help="kind of file")
    parser.add_argument("--model", help="the model's name, for an authors' file")
    parser.add_argument("--like", type=Path, help="with --to published: an authors' file, whose keys are used")
    args = parser.parse_intermixed_args()

    from saccade.train import convert  # here, so that --help answers at once
    from saccade.train.runtime.errors import UserError

    arguments = dict(map(parse, args.arguments))
    if args.to == "saccade" and args.model is None:
        raise UserError("--model is missing: give the name of the model that the file is of (`saccade zoo` lists them)")
    for name, given, kinds in (
        ("--model", args.model, ("saccade", "published")),
        ("--like", args.like, ("published",)),
        ("key=value", arguments, ("saccade",)),
    ):
        if given and args.to not in kinds:
            raise UserError(f"{name} does not apply to --to {args.to}")
    print(f"reading {args.source} …", flush=True)
    if args.to == "openmmlab":
        for file in convert.convert(args.source, args.out):
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
        return
    if args.to == "published":
        done = convert.to_published(args.source, args.out, args.like, args.model)
    else:
        done = convert.from_published(args.source, args.model, args.out, **arguments)
    print(f"{done.file}: {done.file.stat().st_size / 1e6:.1f} MB, read again and equal bit for bit")
    for key in ("sha256", "license"):
        if key in done.provenance:
            print(f"  {key}: {done.provenance[key]}")
    if done.unused:
        print(f"  not in it, since they are computed: {', '.join(done.unused)}")
    print(f"  {done.load}")


def parse(argument: str) -> tuple[str, object]:
    """Return the key and the value of "key=value", the value as a Python literal or else as text."""
    from saccade.train.runtime.errors import UserError

    key, equals, text = argument.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"an argument of the model must be key=value, got {argument}")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
