"""Write a synthetic ImageNet, to try configs and loaders without the real one: 1000 classes, few meaningless images.

python tools/make_imagenet.py /tmp/imagenet                        class folders: 1000 training and 500 val images
python tools/make_imagenet.py /tmp/imagenet --layout tars          the three original files
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty or new folder")
    parser.add_argument("--layout", choices=["folder", "tars"], default="folder")
    parser.add_argument("--per-class", type=int, default=1, help="training images per class")
    parser.add_argument("--val", type=int, default=500, help="number of val images")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"), help="image size in pixels"
    )
    args = parser.parse_args()
    from saccade.train.data import synthetic_imagenet  # here, so that --help is fast
    from timm.data import ImageNetInfo

    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty: choose another folder")
    for name in ("per_class", "val", "size"):
        if min(value if isinstance(value := getattr(args, name), (list, tuple)) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    wnids = ImageNetInfo().label_names()
    splits = synthetic_imagenet.make_images(wnids, args.per_class, args.val, tuple(args.size))
    if args.layout == "tars":
        synthetic_imagenet.write_tars(args.out, splits)
    else:
        synthetic_imagenet.write_folders(args.out, splits)
    print(f"{args.out}: {len(splits['train'])} training and {len(splits['val'])} val images of {len(wnids)} classes")


if __name__ == "__main__":
    main()
