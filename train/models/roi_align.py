"""RoIAlign on CPUs by matrix products.

The samples of a region lie on a grid: their bilinear weights, averaged over each cell, are a product of one matrix per
axis, and the pooled region is `rows @ map @ columns^T`. torchvision's kernel visits every sample of every channel
instead, of which MMDetection's rule has many in large regions: a box of 400 pixels on a map of stride 8 has 64 a cell.
"""

import torch
from torch import Tensor
from torchvision.ops import roi_align as roi_align_of_torchvision


def roi_align(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Pool regions of maps x (B, C, H, W) to (n, C, side, side).

    rois (n, 5): index of the map, left, top, right, bottom, in pixels of the image; scale: of the map, 1 / stride.
    torchvision's `roi_align(aligned=True, sampling_ratio=0)`, which computes it on GPUs, in half precision and in
    exported graphs. `rois` get no gradient.
    """
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor
    supported = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if exported or not supported or torch.is_autocast_enabled("cpu") or not len(rois) or not rois.isfinite().all():
        return roi_align_of_torchvision(x, rois, side, scale, 0, aligned=True)
    return RoIAlign.apply(x, rois.detach(), side, scale)


class RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
        rows = AxisWeights(rois[:, 2], rois[:, 4], x.shape[2], side, scale)
        columns = AxisWeights(rois[:, 1], rois[:, 3], x.shape[3], side, scale)
        image = rois[:, 0].long().tolist()
        maps = x.permute(0, 2, 3, 1).contiguous()
        out = x.new_empty(len(rois), side, side, x.shape[1])
        for i, (top, bottom, left, right) in enumerate(zip(*rows.spans, *columns.spans)):
            region = maps[image[i], top:bottom, left:right]  # (h, w, C)
            half = rows.weights[i, :, : bottom - top] @ region.flatten(1)  # (side, w · C)
            torch.matmul(columns.weights[i, :, : right - left], half.view(side, right - left, -1), out=out[i])
        ctx.rows, ctx.columns, ctx.image, ctx.shape = rows, columns, image, maps.shape
        return out.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.rows, ctx.columns
        dout = dout.permute(0, 2, 3, 1).contiguous()
        dmaps = dout.new_zeros(ctx.shape)
        for i, (top, bottom, left, right) in enumerate(zip(*rows.spans, *columns.spans)):
            half = columns.weights[i, :, : right - left].mT @ dout[i]  # (side, w, C)
            dmaps[ctx.image[i], top:bottom, left:right] += (
                rows.weights[i, :, : bottom - top].mT @ half.flatten(1)
            ).view(bottom - top, right - left, -1)
        return dmaps.permute(0, 3, 1, 2), None, None, None


class AxisWeights:
    """The weights of each region's pixels along an axis.

    weights (n, side, longest): how much each of a region's pixels, from the first that counts, adds to each cell.
    spans: the first pixels (n,) and those after the last (n,), as lists.
    """

    def __init__(self, start: Tensor, end: Tensor, length: int, side: int, scale: float):
        start, end = start * scale - 0.5, end * scale - 0.5
        size = (end - start) / side  # of a cell, in pixels
        count = size.ceil().clamp(min=0)  # of samples in a cell
        n, most = len(start), max(1, int(count.max()))
        sample = torch.arange(most, device=start.device)
        inner = (sample + 0.5) * (size / count.clamp(min=1))[:, None]  # (n, most)
        place = start[:, None, None] + torch.arange(side, device=start.device)[:, None] * size[:, None, None]
        place = place + inner[:, None]  # (n, side, most)
        counts = (sample < count[:, None])[:, None] & (place >= -1) & (place <= length)
        place = place.clamp(0, length - 1)
        low = place.floor()
        share = counts.to(start) / count.clamp(min=1)[:, None, None]
        upper = (place - low) * share
        first = torch.where(counts, low, length).amin((1, 2)).clamp(max=length - 1)
        last = torch.where(counts, (low + 1).clamp(max=length - 1), 0).amax((1, 2)).maximum(first)
        longest = int((last - first).max()) + 1
        cell = (low - first[:, None, None]).long().clamp(0, longest - 1)
        above = (cell + 1).clamp(max=longest - 1)  # its weight is 0 where it is beyond the map
        self.weights = start.new_zeros(n, side, longest)
        self.weights.scatter_add_(2, cell, share - upper).scatter_add_(2, above, upper)
        self.spans = first.long().tolist(), (last.long() + 1).tolist()
