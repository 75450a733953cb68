"""Lift a photograph with its true depth, and draw it from above: docs/bev_motorcycle.png.

The photograph, its disparity and its camera are Middlebury's "Motorcycle" (Scharstein et al., 2014), which scikit-image
ships. The lifter's attention over cameras lifts its colours: one sample a point, no offsets, nothing learned.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from saccade.backbones.dfa3d import SpatialCrossAttention, pillars, project
from saccade.backbones.dfa3d_depth import depth_target
from skimage.data import stereo_motorcycle
from torch.nn.functional import avg_pool2d

FOCAL, CENTRE, OFFSET, BASELINE = 994.978, (311.193, 254.877), 31.086, 0.193001  # pixels, and metres
RANGE, CELL, BOUND, STRIDE = (-1.5, 1.8, -1.2, 1.5, 4.8, 0.8), 0.02, (1.75, 5.25, 0.025), 5
PILLAR = 80


def main() -> None:
    left, _, disparity = (picture[:, :740] for picture in stereo_motorcycle())  # whole cells
    image = torch.from_numpy(left).permute(2, 0, 1).float() / 255
    known = np.isfinite(disparity)
    depth = torch.from_numpy(np.where(known, FOCAL * BASELINE / (np.where(known, disparity, 0) + OFFSET), 0)).float()
    height, width = depth.shape
    # x to the right, y ahead, z up.
    matrix = torch.tensor([[FOCAL, CENTRE[0], 0, 0], [0, CENTRE[1], -FOCAL, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    bev = round((RANGE[4] - RANGE[1]) / CELL), round((RANGE[3] - RANGE[0]) / CELL)

    colours = avg_pool2d(image[None], STRIDE)
    shape = tuple(colours.shape[2:])
    value = torch.cat([colours, torch.ones(1, 1, *shape)], 1).flatten(2).mT  # the fourth channel counts
    bins = depth_target(depth[None], STRIDE, BOUND).flatten(2).mT
    lift = SpatialCrossAttention(4, heads=1, levels=1, points=PILLAR, depth=True, drop=0.0).eval()
    with torch.no_grad():
        for p in lift.parameters():
            p.zero_()
        for layer in (lift.deformable_attention.value_proj, lift.output_proj):
            layer.weight.copy_(torch.eye(4))
        points = pillars(bev, (*RANGE[:2], 0, *RANGE[3:5], 1), 1, depth[:0]).expand(-1, PILLAR, -1).clone()
        points[..., 2] = torch.linspace(RANGE[2], RANGE[5], PILLAR)
        reference, seen = project(points, matrix[None, None], (height, width), BOUND)
        out = lift(torch.zeros(1, len(points), 4), value[None], bins[None], [shape], reference, seen)
    out = out.view(*bev, 4)
    seen_from_above = torch.where(out[..., 3:] > 0.02 / PILLAR, out[..., :3] / out[..., 3:].clamp(min=1e-6), 1.0)
    above = Image.fromarray((255 * seen_from_above.clamp(0, 1)).byte().flip(0).numpy())
    above = above.resize((round(bev[1] * height / bev[0]), height), Image.Resampling.BILINEAR)
    far = ((depth - BOUND[0]) / (BOUND[1] - BOUND[0])).clamp(0, 1)
    shade = torch.where(depth > 0, 255 * (1 - far), 0).byte().numpy()
    sheet = Image.new("RGB", (2 * width + above.width, height), "white")
    for at, picture in ((0, Image.fromarray(left)), (width, Image.fromarray(shade)), (2 * width, above)):
        sheet.paste(picture.convert("RGB"), (at, 0))
    file = Path(__file__).resolve().parents[1] / "docs" / "bev_motorcycle.png"
    sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3), Image.Resampling.LANCZOS).save(file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
