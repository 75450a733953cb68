"""Export a model for another runtime, and compare the file with PyTorch there before it is kept.

  saccade export runs/demo demo.onnx --to onnx
  saccade export biformer_s biformer_s.xml --to openvino --checkpoint biformer_small_best.pth --size 224 224
  saccade export runs/demo demo.pt2 --to aoti                            compiled code; needs a C++ compiler
  saccade export runs/segmenter segmenter.pt2 --to torch-export --size 512 512 --dynamic-size
  saccade export runs/detector detector.onnx --to onnx --size 800 1344
  saccade export runs/pets pets.onnx --to onnx --int8 pets/val           in int8, calibrated and tested on a folder

The file takes batches of any number (a detector: one image) of one size or, with --dynamic-size, of any that the model
takes. Beside it, OUT.json has the image size, mean, std and class names. A file whose results are not the model's is
not kept, and no file is replaced. Exit codes: 0 done, 2 an error to fix, 74 a file could not be written.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a finished run, or a model's name")
    parser.add_argument("out", type=Path, help="the file to write: .onnx, .xml (openvino), .pt2 or .pt (torchscript)")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help="onnx, openvino, torch-export, aoti (AOTInductor) or torchscript"
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: the model's)")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of other sizes, too")
    parser.add_argument("--checkpoint", type=Path, help="weights for a model's name")
    parser.add_argument(
        "--int8", type=Path, metavar="FOLDER", help="quantise, calibrated on these images (class folders: with top-1)"
    )
    parser.add_argument(
        "--max-drop", type=float, default=5.0, metavar="POINTS", help="of top-1 by int8, in percent (default: 5)"
    )
    args = parser.parse_args()

    from saccade.train.export import export
    from saccade.train.runtime.errors import set_options

    set_options(checkpoint="--checkpoint FILE")
    print(f"exporting {args.model} …", flush=True)
    options = (args.size, args.checkpoint, args.dynamic_size, args.int8, args.max_drop)
    done = export(args.model, args.out, args.to, *options)
    print(f"equal to PyTorch within {done.difference:.1e} of the largest output, {done.compared}")
    if (found := done.accuracy) is not None:
        print(
            f"int8: {found.metric} {found.before:.2f} % before, {found.after:.2f} % after, on {found.images} images; "
            f"calibrated on {found.calibrated} others"
        )
    for file in done.files:
        print(f"  {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
