"""Resize uint8 images as OpenCV's bilinear interpolation does, bit for bit: what OpenMMLab's models were tested on.

OpenCV computes in fixed point: weights are multiples of 1/2048, rounded half to even from float32, and the products
are shifted right between rows and columns. The results differ from torch's own interpolation by up to one grey level,
which moves boxes by hundredths of a pixel and changes the class of pixels at borders.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.images import fit_size


def scaled_size(height: int, width: int, scale: Sequence[float]) -> tuple[int, int]:
    """Return the largest (height, width) of the same aspect ratio within `scale`, which has a short and a long side.

    The sides are rounded half up, each on its own, so the two axes may get slightly different factors.
    """
    height, width = fit_size(height, width, scale)
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


def resize_uint8(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image (..., H, W) with values 0 … 255, in any dtype, to (..., *size); returns its dtype.

    Values are rounded to whole numbers first, as a uint8 image has them; an image that already has the size is
    returned unchanged.
    """
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    pixels = image.round().to(torch.int32)
    left, right, a = _taps(width, size[1], clamp=True, device=image.device)
    top, bottom, b = _taps(height, size[0], clamp=False, device=image.device)
    # The integer divisions are OpenCV's shifts: nothing here is negative, and ONNX has no shift of signed integers.
    rows = pixels.index_select(-1, left) * (2048 - a) + pixels.index_select(-1, right) * a
    rows = torch.div(rows, 16, rounding_mode="floor")
    upper, lower = rows.index_select(-2, top) * (2048 - b)[:, None], rows.index_select(-2, bottom) * b[:, None]
    upper, lower = (torch.div(part, 65536, rounding_mode="floor") for part in (upper, lower))
    return torch.div(upper + lower + 2, 4, rounding_mode="floor").to(image.dtype)


def _taps(old: int, new: int, clamp: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source indices of each of `new` positions, and the second one's weight in 2048ths.

    clamp: positions outside the centres of the first and last pixel get those pixels alone; else only the indices are
    clamped, as OpenCV does for rows.
    """
    position = ((torch.arange(new, dtype=torch.float64) + 0.5) * (1 / (new / old)) - 0.5).float()
    first = position.floor()
    weight = position - first
    if clamp:
        outside = (first < 0) | (first >= old - 1)
        weight = weight.where(~outside, 0)
    first = first.long()
    second = (first + 1).clamp(0, old - 1)
    return first.clamp(0, old - 1).to(device), second.to(device), (2048 * weight).round().int().to(device)
