"""Export a model to ONNX, OpenVINO, torch.export or TorchScript, and compare the file with PyTorch in its own runtime.

  python tools/export.py runs/demo --to onnx model.onnx
  python tools/export.py biformer_s --checkpoint biformer_small_best.pth --to openvino biformer_s.xml --size 224 224
  python tools/export.py runs/detector --to onnx detector.onnx --size 800 1344

The file takes images of one size and batches of any number (a detector: one image). Beside it, OUT.json has the image
size, mean, std and class names. A file whose results are not the model's is not kept, and no file is replaced. Exit
codes: 0 done, 2 an error to fix, 74 a file could not be written.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a finished run, or a model's name")
    parser.add_argument("out", type=Path, help="the file to write: .onnx, .xml (openvino), .pt2 or .pt (torchscript)")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="onnx, openvino, torch-export or torchscript")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: the model's)")
    parser.add_argument("--checkpoint", type=Path, help="weights for a model's name")
    args = parser.parse_args()

    from saccade.train.export import export

    print(f"exporting {args.model} …", flush=True)
    done = export(args.model, args.out, args.to, args.size, args.checkpoint)
    batches = ", ".join(map(str, done.batches))
    print(f"equal to PyTorch within {done.difference:.1e} of the largest output, at batches of {batches}")
    for file in done.files:
        print(f"  {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
