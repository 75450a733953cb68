"""A backbone with a segmentation head, and how it labels pictures of any size: whole or in windows, at many scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..data.images import fit_size
from ..runtime.errors import UserError
from .body import OnBody
from .fcn import FCNHead
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

HEADS = dict(upernet=UPerNet, semantic_fpn=SemanticFPN)
Place = tuple[int, int, int, int]  # top, left, height and width of a window
ROWS = 2**24  # logits of the final map that are in memory at once: 64 MiB in fp32


@dataclass
class Inference:
    """How a picture becomes the model's inputs, its "views".

    scale: (long, short): the picture becomes the largest of its shape within, in either direction; None: it stays as it
    is. multiple: of which both sides are made multiples, by enlarging. scales, flip: factors of `scale`, and mirrored
    pictures beside each, over which softmaxes are averaged. crop, stride: sides of windows that cover the view (height,
    width) and their distance at most, logits being averaged where they overlap; None: the view whole.
    """

    scale: Sequence[int] | None = None
    multiple: int = 1
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    crop: Sequence[int] | None = None
    stride: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and (self.crop is None or any(s > c for s, c in zip(self.stride, self.crop))):
            raise UserError(f"stride={self.stride} must be at most crop={self.crop}: windows must cover the picture")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales={self.scales} must be positive factors, one or more")

    def size(self, height: int, width: int, factor: float) -> tuple[int, int]:
        """The size of a picture's view."""
        if self.scale is None:
            height, width = height * factor, width * factor
        else:
            height, width = fit_size(height, width, [int(side * factor) for side in self.scale])
        return tuple(self.multiple * max(1, math.ceil(int(n + 0.5) / self.multiple)) for n in (height, width))

    def windows(self, height: int, width: int) -> list[Place]:
        """All windows, as mmsegmentation places them: the last ones end at the edge."""
        if self.crop is None:
            return [(0, 0, height, width)]
        stride = self.stride or self.crop
        (h, tops), (w, lefts) = (_places(*sides) for sides in zip((height, width), self.crop, stride))
        return [(top, left, h, w) for top in tops for left in lefts]


def _places(length: int, crop: int, stride: int) -> tuple[int, list[int]]:
    crop = min(crop, length)
    count = max(length - crop + stride - 1, 0) // stride + 1
    return crop, [min(i * stride, length - crop) for i in range(count)]


class Segmenter(OnBody):
    """A backbone with a head, and in training an auxiliary one. Called with one of two things:

    images (B, 3, H, W) in [0, 1]: logits (B, classes, H / s, W / s), s being the stride of the backbone's finest map;
    in training (logits, the auxiliary head's logits or None).
    a list of pictures (3, H, W), uint8, or float in [0, 1], each of its own size: a list of label maps (H, W) int64.

    backbone: of saccade.train.models.build.create_features; its last four maps are used. head, auxiliary: of HEADS, and
    whether there is an FCN head beside it. drop_rate: of both. inference: of pictures.
    mean, std: of the backbone's inputs. no_decay: patterns of parameter names without weight decay, beside the
    backbone's own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        head: str = "upernet",
        auxiliary: bool = True,
        drop_rate: float = 0.1,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        inference: Inference | None = None,
        no_decay: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__()
        self.backbone, self.classes, self.no_decay = backbone, classes, tuple(no_decay)
        self.pretrained_cfg, self.inference = backbone.pretrained_cfg, inference or Inference()
        channels = backbone.feature_info.channels()[-4:]
        strides = dict(strides=backbone.feature_info.reduction()[-4:]) if head == "semantic_fpn" else {}
        if len(channels) < 2:
            raise UserError(f"{head} needs a backbone that gives two maps or more, not {len(channels)}")
        self.head = HEADS[head](channels, classes=classes, drop_rate=drop_rate, **strides, **kwargs)
        self.auxiliary = FCNHead(channels, classes, drop_rate=drop_rate) if auxiliary else None
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor | list[Tensor]) -> Any:
        if isinstance(images, list):
            return [self._labelled(picture) for picture in images]
        maps = self._maps(images)
        if not self.training:
            return self.head(maps)
        return self.head(maps), self.auxiliary(maps) if self.auxiliary is not None else None

    def _maps(self, images: Tensor) -> list[Tensor]:
        return self.backbone((images - self.mean) / self.std)[-4:]

    def _labelled(self, picture: Tensor) -> Tensor:
        """The label map (H, W) of one picture (3, H, W)."""
        picture = picture.to(self.mean.device)
        picture = picture / 255 if picture.dtype == torch.uint8 else picture
        views = []
        for factor in self.inference.scales:
            size = self.inference.size(*picture.shape[1:], factor)
            scaled = interpolate(picture[None], size, mode="bilinear", align_corners=False)
            for mirrored in (False, True)[: 1 + self.inference.flip]:
                view = scaled.flip(3) if mirrored else scaled
                windows = []
                for top, left, height, width in self.inference.windows(*size):
                    part = view[..., top : top + height, left : left + width]
                    windows.append(((top, left, height, width), self.head(self._maps(part))[0]))
                views.append(View(windows, size, mirrored))
        return label_map(views, picture.shape[1:])


class View:
    """The logits of a picture's view, from those of its windows. What is as large as the view is made some rows a time.

    windows: place and logits (classes, h, w) of each. size: (H, W) of the view. mirrored: left to right.
    """

    def __init__(self, windows: list[tuple[Place, Tensor]], size: Sequence[int], mirrored: bool):
        self.windows, self.size, self.mirrored = windows, size, mirrored

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the view's logits (classes, stop - start, W): the windows', enlarged, averaged where they overlap."""
        first = self.windows[0][1]
        sums = first.new_zeros(len(first), stop - start, self.size[1], dtype=torch.float32)
        counts = first.new_zeros(stop - start, self.size[1], dtype=torch.float32)
        for (top, left, height, width), logits in self.windows:
            low, high = max(start, top), min(stop, top + height)
            if low < high:
                part = ..., slice(low - start, high - start), slice(left, left + width)
                sums[part] += enlarged(logits.float(), (height, width), low - top, high - top)
                counts[part] += 1
        return sums.div_(counts)

    def rows_at(self, size: Sequence[int], start: int, stop: int) -> Tensor:
        """Rows of the logits enlarged, once more, to the picture's own `size` (H, W), not mirrored any more."""
        low, high = _sources(self.size[0], size[0], start, stop)
        rows = enlarged(self.rows(low, high), size, start, stop, of=self.size[0], first=low)
        return rows.flip(2) if self.mirrored else rows


def label_map(views: Sequence[View], size: Sequence[int]) -> Tensor:
    """The label map (H, W) int64 of a picture of this size: the largest logit, or mean softmax of several views."""
    classes = len(views[0].windows[0][1])
    step = max(1, ROWS // (classes * size[1]))
    labels = []
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        if len(views) == 1:
            found = views[0].rows_at(size, start, stop)
        else:
            found = sum(view.rows_at(size, start, stop).softmax(0) for view in views)
        labels.append(found.argmax(0))
    return torch.cat(labels)


def _sources(height: int, new_height: int, start: int, stop: int) -> tuple[int, int]:
    """The range of rows, of `height`, that rows start … stop - 1 of a bilinear enlargement to `new_height` mix."""
    low = ((start + 0.5) * height / new_height - 0.5, (stop - 0.5) * height / new_height - 0.5)
    return max(0, math.floor(low[0]) - 1), min(height, math.floor(low[1]) + 3)


def enlarged(x: Tensor, size: Sequence[int], start: int, stop: int, of: int | None = None, first: int = 0) -> Tensor:
    """Rows start … stop - 1 of maps x (C, h, w), resized to `size` (H, W) as `resize` does.

    of: the height of the whole maps, of which x has the rows from `first` on; None: x is whole.
    """
    of = x.shape[1] if of is None else of
    rows = torch.arange(start, stop, device=x.device, dtype=torch.float64)
    places = ((rows + 0.5) * (of / size[0]) - 0.5).clamp_min(0)
    above = places.floor().long().clamp_max(of - 1)
    below = (above + 1).clamp_max(of - 1)
    share = (places - above).to(x.dtype).view(1, -1, 1)
    x = torch.lerp(x[:, above - first], x[:, below - first], share)
    if x.shape[2] == size[1]:
        return x
    return interpolate(x[None], (x.shape[1], size[1]), mode="bilinear", align_corners=False)[0]
