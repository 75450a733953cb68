"""Segmenters on any timm model, and inference on images of any size: whole or in windows, at several scales.

They compute what MMSegmentation 0.x does, and their parameters have the names of its files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..runtime.errors import UserError
from .body import OnBody, to_full_precision
from .fcn import FCNHead
from .fpn import FPN
from .resize import resize_uint8, scaled_size
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

Place = tuple[int, int, int, int]  # top, left, height and width of a window
ROWS = 2**24  # logits of the final map per chunk of rows: 64 MiB in fp32


@dataclass
class Inference:
    """How an image is converted to the model's inputs, its "views".

    scale: (long, short): the image is resized to the largest size of its aspect ratio within; None: it keeps its size.
    multiple: both sides are made multiples of this by a second resize, as in BiFormer's Semantic FPN.
    scales, flip: factors of `scale`, and whether to add flipped images; softmaxes are averaged over them.
    crop, stride: (height, width) of windows that cover the view, and the largest distance between them; logits are
    averaged where windows overlap. None: the view is one window.
    """

    scale: Sequence[int] | None = None
    multiple: int = 1
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    crop: Sequence[int] | None = None
    stride: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and (self.crop is None or any(s > c for s, c in zip(self.stride, self.crop))):
            raise UserError(f"stride={self.stride} must be at most crop={self.crop}: windows must cover the image")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales={self.scales} must be positive factors, one or more")

    def size(self, height: int, width: int, factor: float) -> tuple[int, int]:
        """Return the size that an image is resized to for a view, before it is made a multiple."""
        scale = self.scale or (height, width)
        return scaled_size(height, width, [int(side * factor) for side in scale])

    def multiple_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size rounded up to multiples."""
        return tuple(-(-side // self.multiple) * self.multiple for side in size)

    def windows(self, height: int, width: int) -> list[Place]:
        """Return all windows, at mmsegmentation's positions: the last ones end at the edge."""
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
    """A backbone with a decode head, and in training an auxiliary head. Its input is one of:

    images (B, 3, H, W) in [0, 1]: returns logits (B, num_classes, H / s, W / s), s being the stride of the backbone's
    finest map; in training (logits, the auxiliary head's logits or None).
    a list of images (3, H, W), uint8, or float in [0, 1], each of its own size: returns label maps (H, W) int64.

    backbone: of saccade.train.models.build.create_features; its last four maps are used. head: upernet or semantic_fpn.
    auxiliary: whether there is an FCN head beside it. drop_rate: of both. inference: how images of any size are
    labelled. pyramid: channels of Semantic FPN's pyramid. mean, std: of the backbone's inputs. no_decay: patterns of
    parameter names without weight decay, besides the backbone's own. kwargs: of the decode head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        head: str = "upernet",
        auxiliary: bool = True,
        drop_rate: float = 0.1,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        inference: Inference | None = None,
        no_decay: Sequence[str] = (),
        pyramid: int = 256,
        **kwargs: Any,
    ):
        super().__init__()
        self.backbone, self.no_decay = backbone, tuple(no_decay)
        self.pretrained_cfg, self.inference = backbone.pretrained_cfg, inference or Inference()
        channels = backbone.feature_info.channels()[-4:]
        if len(channels) < 2:
            raise UserError(f"{head} needs a backbone with two or more maps, got {len(channels)}")
        common = dict(num_classes=num_classes, drop_rate=drop_rate)
        self.auxiliary_head = FCNHead(channels, **common) if auxiliary else None
        if head == "semantic_fpn":
            self.neck = FPN(channels, pyramid)
            common |= dict(strides=backbone.feature_info.reduction()[-4:])
            self.decode_head = SemanticFPN(pyramid, **common, **kwargs)
        else:
            self.neck = nn.Identity()
            self.decode_head = UPerNet(channels, **common, **kwargs)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor | list[Tensor]) -> Any:
        if isinstance(images, list):
            return [self._label(image) for image in images]
        maps = self._maps(images)
        if not self.training:
            return self.decode(maps)
        auxiliary = self.auxiliary_head(maps) if self.auxiliary_head is not None else None
        return self.decode(maps), auxiliary

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Return the decode head's logits for the backbone's maps."""
        return self.decode_head(self.neck(maps))

    def _maps(self, images: Tensor) -> list[Tensor]:
        return self.backbone((images - self.mean) / self.std)[-4:]

    def _label(self, image: Tensor) -> Tensor:
        """Return the label map (H, W) of one image (3, H, W), uint8 or from 0 to 1."""
        image = image.to(self.mean) * (1 if image.dtype == torch.uint8 else 255)
        views = []
        for factor in self.inference.scales:
            size = self.inference.size(*image.shape[1:], factor)
            scaled = resize_uint8(image, size)
            size = self.inference.multiple_of(size)
            scaled = resize_uint8(scaled, size)[None] / 255
            for mirrored in (False, True)[: 1 + self.inference.flip]:
                view = scaled.flip(3) if mirrored else scaled
                windows = []
                for top, left, height, width in self.inference.windows(*size):
                    part = view[..., top : top + height, left : left + width]
                    windows.append(((top, left, height, width), to_full_precision(self.decode(self._maps(part))[0])))
                views.append(View(windows, size, mirrored))
        return label_map(views, image.shape[1:])


class View:
    """The logits of an image's view, from those of its windows. Tensors of the view's size are computed in chunks of
    rows.

    windows: position and logits (classes, h, w) of each. size: (H, W) of the view. mirrored: flipped horizontally.
    """

    def __init__(self, windows: list[tuple[Place, Tensor]], size: Sequence[int], mirrored: bool):
        self.windows, self.size, self.mirrored = windows, size, mirrored

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the view's logits (classes, stop - start, W): resized windows, averaged where they overlap."""
        first = self.windows[0][1]
        sums = first.new_zeros(len(first), stop - start, self.size[1])
        counts = first.new_zeros(stop - start, self.size[1])
        for (top, left, height, width), logits in self.windows:
            low, high = max(start, top), min(stop, top + height)
            if low < high:
                part = ..., slice(low - start, high - start), slice(left, left + width)
                sums[part] += enlarged(logits, (height, width), low - top, high - top)
                counts[part] += 1
        return sums.div_(counts)

    def rows_at(self, size: Sequence[int], start: int, stop: int) -> Tensor:
        """Return rows of the logits resized to the image's `size` (H, W), and flipped back."""
        low, high = _sources(self.size[0], size[0], start, stop)
        rows = enlarged(self.rows(low, high), size, start, stop, of=self.size[0], first=low)
        return rows.flip(2) if self.mirrored else rows


def label_map(views: Sequence[View], size: Sequence[int]) -> Tensor:
    """Return an image's label map (H, W) int64: the largest logit, or the largest mean softmax of several views."""
    classes = len(views[0].windows[0][1])
    step = max(1, ROWS // (classes * size[1]))
    labels = []
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        if len(views) == 1:
            scores = views[0].rows_at(size, start, stop)
        else:
            scores = sum(view.rows_at(size, start, stop).softmax(0) for view in views)
        labels.append(scores.argmax(0))
    return torch.cat(labels)


def _sources(height: int, new_height: int, start: int, stop: int) -> tuple[int, int]:
    """Return the range of rows, of `height`, that rows start … stop - 1 of a bilinear resize to `new_height` read."""
    low = ((start + 0.5) * height / new_height - 0.5, (stop - 0.5) * height / new_height - 0.5)
    return max(0, math.floor(low[0]) - 1), min(height, math.floor(low[1]) + 3)


def enlarged(x: Tensor, size: Sequence[int], start: int, stop: int, of: int | None = None, first: int = 0) -> Tensor:
    """Return rows start … stop - 1 of maps x (C, h, w) resized to `size` (H, W) as `resize` does.

    of: the height of the complete maps, of which x has the rows that begin at `first`; None: x is complete.
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
