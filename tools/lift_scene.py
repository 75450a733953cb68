"""Lift the colours of a rendered road scene with its exact depth and draw it from above: docs/bev_lift.png.

    python tools/lift_scene.py

The scene, its six cameras and its depth come from saccade.train.data.bev_scenes. The lifter's attention over cameras
lifts the colours: one sample per point, no offsets, nothing learned.
"""

import argparse
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=int, default=5, help="index of the scene (default 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "bev_lift.png")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import torch
from PIL import Image
from saccade.backbones.dfa3d import SpatialCrossAttention, make_pillars, project
from saccade.backbones.dfa3d_depth import depth_target
from saccade.train.data.bev_scenes import CAMERAS, LIDAR, BevScenes, Frame
from torch import Tensor

SIZE, REACH, CELL, HEIGHT = (224, 400), 12.0, 0.1, 3.0  # image in pixels; range, cell size and height in metres
BOUND, POINTS = (1.0, 19.0, 0.3), 24  # nearest and farthest depth and depth bin in metres; points above each cell


def lift_colours(frame: Frame) -> Tensor:  # (rows, columns, 3) from 0 to 1, white where no camera has a view
    colours = torch.from_numpy(frame.images).permute(0, 3, 1, 2).float() / 255
    depth, matrices = (torch.from_numpy(x).float() for x in (frame.depth, frame.lidar2img))
    value = torch.cat([colours, torch.ones_like(colours[:, :1])], 1).flatten(2).mT  # the fourth channel is the weight
    bins = depth_target(depth, 1, BOUND).flatten(2).mT

    lift = SpatialCrossAttention(4, heads=1, levels=1, points=POINTS, depth=True, drop=0.0).eval()
    for p in lift.parameters():
        p.data.zero_()
    for layer in (lift.deformable_attention.value_proj, lift.output_proj):
        layer.weight.data.copy_(torch.eye(4))

    side = round(2 * REACH / CELL)
    points = make_pillars((side, side), (-REACH, -REACH, 0, REACH, REACH, 1), 1, depth).expand(-1, POINTS, -1).clone()
    points[..., 2] = torch.linspace(-LIDAR, HEIGHT - LIDAR, POINTS)
    reference, seen = project(points, matrices[None], SIZE, BOUND)
    with torch.no_grad():
        out = lift(torch.zeros(1, len(points), 4), value[None], bins[None], [SIZE], reference, seen)
    sums, counts = out.view(side, side, 4).flip(0).split((3, 1), 2)  # the first row of the output is the nearest
    return torch.where(counts > 0.02 / POINTS, sums / counts.clamp(min=1e-6), 1.0).clamp(0, 1)


def main() -> None:
    args = make_parser().parse_args()
    frame = BevScenes(img_size=SIZE, radius=REACH).world("test", args.scene).frame(0.0, SIZE)
    above = Image.fromarray((255 * lift_colours(frame)).byte().numpy())
    height, width = 3 * SIZE[0], 2 * SIZE[1]
    sheet = Image.new("RGB", (width + height, height), "white")
    names = list(CAMERAS)
    rows = [("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"), ("CAM_FRONT", "CAM_BACK"), ("CAM_BACK_LEFT", "CAM_BACK_RIGHT")]
    for i, row in enumerate(rows):
        for j, name in enumerate(row):
            sheet.paste(Image.fromarray(frame.images[names.index(name)]), (j * SIZE[1], i * SIZE[0]))
    sheet.paste(above.resize((height, height), Image.Resampling.BILINEAR), (width, 0))
    sheet.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
