"""Depth of every cell of a feature map as a distribution over bins: the network, and targets from LiDAR.

Of DFA3D's lifter (arXiv 2307.12972), after BEVDepth (arXiv 2206.10092). Written from a description of the published
model, whose code is for non-commercial use only. Modules have the published names, so a state dict fits as it is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..ops.precision import no_autocast


class ConvNorm(nn.Module):
    """A convolution of one of ASPP's branches, BatchNorm, ReLU."""

    def __init__(self, dim: int, kernel: int, dilation: int):
        super().__init__()
        pad = dilation if kernel == 3 else 0
        self.atrous_conv = nn.Conv2d(dim, dim, kernel, padding=pad, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.atrous_conv(x)).relu()


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (arXiv 1706.05587): (B, C, H, W) -> same."""

    def __init__(self, dim: int):
        super().__init__()
        self.aspp1 = ConvNorm(dim, 1, 1)
        self.aspp2 = ConvNorm(dim, 3, 6)
        self.aspp3 = ConvNorm(dim, 3, 12)
        self.aspp4 = ConvNorm(dim, 3, 18)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.global_avg_pool(x).expand_as(x)
        parts = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), pooled]
        return self.bn1(self.conv1(torch.cat(parts, 1))).relu()


class DeformConv(nn.Module):
    """A 3x3 convolution (arXiv 1703.06211) whose nine taps another one displaces: (B, C, H, W) -> same.

    By grid_sample and a product: torchvision's deform_conv2d, which is equal, takes several times as long on a CPU.
    """

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(dim, dim // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.conv_offset = nn.Conv2d(dim, 18, 3, padding=1)  # (dy, dx) of each tap
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        offset = self.conv_offset(x)
        with no_autocast(x):
            full = torch.promote_types(self.weight.dtype, torch.float32)
            dy, dx = offset.to(full).unflatten(1, (9, 2)).unbind(2)  # (B, 9, H, W)
            step = torch.arange(-1, 2, device=x.device)[:, None, None]
            row, column = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
            y = dy + row + step.repeat_interleave(3, 0)
            u = dx + column + step.repeat(3, 1, 1)
            grid = torch.stack([(2 * u + 1) / W - 1, (2 * y + 1) / H - 1], -1).flatten(2, 3)  # (B, 9, H · W, 2)
            taps = F.grid_sample(x.to(full), grid, padding_mode="zeros", align_corners=False)  # (B, C, 9, H · W)
            taps = taps.unflatten(1, (self.groups, -1)).flatten(2, 3)
            out = self.weight.to(full).reshape(self.groups, -1, taps.shape[2]) @ taps
            return out.view(B, self.weight.shape[0], H, W).to(x.dtype)


class DepthHead(nn.Module):
    """Feature map (B, C, H, W) -> probabilities (B, codes, H, W) -> distribution (B, bins, H, W) by `decode`.

    Args:
        in_chans: C.
        dim: width inside.
        bins: D, of the depth range.
        groups: bins that a code stands for, near to far: of each size bins / sum(groups) codes, one softmax over all.
            Published: (2, 4, 8). Each bin gets the whole probability of its code, so that a decoded distribution sums
            to between min(groups) and max(groups). (): a code a bin.
    """

    def __init__(self, in_chans: int, dim: int, bins: int, groups: Sequence[int] = ()):
        super().__init__()
        self.bins, self.groups = bins, tuple(groups) or (1,)
        if bins % sum(self.groups):
            raise ValueError(f"the depth bins must be a multiple of the groups' {sum(self.groups)}, got {bins}")
        self.reduce_conv = nn.Sequential(nn.Conv2d(in_chans, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU())
        self.each = bins // sum(self.groups)  # codes of each group
        self.depth_conv = nn.Sequential(
            *(BasicBlock(dim, dim) for _ in range(3)),
            ASPP(dim),
            DeformConv(dim, groups=4),
            nn.Conv2d(dim, self.each * len(self.groups), 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.depth_conv(self.reduce_conv(x))
        return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def decode(self, codes: Tensor) -> Tensor:
        if self.groups == (1,):
            return codes
        parts = codes.split(self.each, 1)
        return torch.cat([part.repeat_interleave(size, 1) for part, size in zip(parts, self.groups)], 1)

    def encode(self, bins: Tensor) -> Tensor:
        """Sum a distribution (B, bins, H, W) over each code's bins."""
        if self.groups == (1,):
            return bins
        parts = bins.split([self.each * size for size in self.groups], 1)
        return torch.cat([part.unflatten(1, (self.each, size)).sum(2) for part, size in zip(parts, self.groups)], 1)


def depth_target(
    depth: Tensor, block: int | tuple[int, int], bound: tuple[float, float, float], tolerance: int = 0
) -> Tensor:
    """Sparse depth (B, H, W) in metres, 0 where there is none -> (B, D, ceil(H / block), ceil(W / block)) of 0 and 1.

    A cell's depth is the least of its block's. bound: (nearest, farthest, step): bin k is from nearest + k · step to
    nearest + (k + 1) · step. A cell without a depth, or with one out of the range, is zero. tolerance: as many bins on
    either side are set, too; all are then 1 less some 1e-5, as published.
    """
    low, _, step = bound
    bins = depth_bins(bound)
    tall, wide = (block, block) if isinstance(block, int) else block
    depth = F.pad(depth, (0, -depth.shape[2] % wide, 0, -depth.shape[1] % tall))
    depth = torch.where(depth > 0, depth, torch.inf)
    nearest = -F.max_pool2d(-depth[:, None], (tall, wide))[:, 0]
    nearest = torch.where(nearest.isinf(), low - step, nearest)
    index = ((nearest - (low - step)) / step).floor()  # 0: none
    index = torch.where((index >= 0) & (index <= bins), index, 0).long()
    target = F.one_hot(index, bins + 1)[..., 1:].to(depth.dtype).permute(0, 3, 1, 2)
    if tolerance:  # binomial weights, as the published targets have them: they differ from 1 by no more than 1e-5
        for _ in range(tolerance):
            target = target + F.pad(target, (0, 0, 0, 0, 0, 1))[:, 1:]
        for _ in range(tolerance):
            target = target + F.pad(target, (0, 0, 0, 0, 1, 0))[:, :-1]
        target = target / (target + 1e-5)
    return target


def depth_bins(bound: tuple[float, float, float]) -> int:
    low, high, step = bound
    bins = round((high - low) / step)
    if bins < 1 or abs(bins * step - (high - low)) > 1e-6 * (high - low):
        raise ValueError(f"depth_bound must be (nearest, farthest, step) with whole steps between, got {bound}")
    return bins
