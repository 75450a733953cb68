"""Detectors in a bird's-eye view: a lifter of saccade.backbones, and a head on its view.

A box is (x, y, z of its centre, length, width, height, yaw, velocity x, y) in metres, radians and metres per second, in
the view's coordinates. Every head has forward(view (B, E, H, W)) -> outputs, loss(outputs, boxes, labels) -> {name:
weighted scalar}, and boxes(outputs) -> for each sample (boxes (n, 9), scores (n,), labels (n,)).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from ...backbones.dfa3d import ENCODER_KEYS, DeformableAttention, convert, rename
from ...backbones.published import Rules, rename_key
from ..runtime.distributed import all_reduce_sum, world_size
from .body import to_full_precision

CODE_WEIGHTS = (1.0,) * 8 + (0.2,) * 2  # velocity is hard to estimate


class BevDetector(nn.Module):
    """A lifter and a head: from frames, oldest first, to the head's outputs on the view of the last one.

    A frame is a dict of the lifter's arguments: images, lidar2img, and as there are motion, can_bus, cameras, depth,
    scene_start. known_depth: depth is given to the lifter, in the depth network's place. depth_weight: of the depth
    network's loss.
    """

    def __init__(self, lifter: nn.Module, head: nn.Module, known_depth: bool = False, depth_weight: float = 0.5):
        super().__init__()
        self.lifter, self.head, self.known_depth, self.depth_weight = lifter, head, known_depth, depth_weight

    def look(self, frame: dict[str, Tensor], before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (the view of a frame, the depth network's codes); before: the view of the frame before, if any."""
        given = {name: frame[name] for name in ("motion", "can_bus", "cameras", "scene_start") if name in frame}
        if before is None:
            given.pop("motion", None)
        if not self.lifter.can_bus:
            given.pop("can_bus", None)
        depth = frame["depth"] if self.known_depth else None
        return self.lifter(frame["images"], frame["lidar2img"], before, **given, depth=depth, return_depth=True)

    def forward(
        self, frames: Sequence[dict[str, Tensor]], before: Tensor | None = None, return_view: bool = False
    ) -> tuple[Any, ...]:
        """Return (the head's outputs, the depth network's codes (B, N, codes, h, w) of the last frame), and with
        return_view the last view too.

        What came before is looked at without a gradient, and as in evaluation, as published. before: the view before
        the first frame.
        """
        view = before
        if len(frames) > 1:
            learning = [module for module in self.lifter.modules() if module.training]
            self.lifter.eval()
            with torch.no_grad():
                for frame in frames[:-1]:
                    view = self.look(frame, view)[0]
            for module in learning:
                module.training = True
        view, codes = self.look(frames[-1], view)
        return (self.head(view), codes, view) if return_view else (self.head(view), codes)

    def depth_loss(self, codes: Tensor | None, depth: Tensor | None) -> Tensor:
        """Return the weighted loss of `forward`'s codes against depth (B, N, H, W) in metres, 0 where unknown; without
        either it is 0."""
        if codes is None or depth is None:
            return torch.zeros((), device=next(self.parameters()).device)
        return self.depth_weight * depth_loss(codes, self.lifter.depth_codes(depth))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return two layers, the image backbone and the rest: layer_decay=0.1 is the backbone's share of the rate."""
        return dict(stem=r"^lifter\.backbone\.", blocks=r"^(?:lifter\.(?!backbone\.)|head\.)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.lifter.set_grad_checkpointing(enable)


def depth_loss(codes: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of probabilities (B, N, codes, H, W): summed over the codes, averaged over the
    cells that have a target."""
    has = target.amax(2) > 0
    with torch.autocast(codes.device.type, enabled=False):
        loss = nn.functional.binary_cross_entropy(codes, target, reduction="none").sum(2)
    return (loss * has).sum() / has.sum().clamp(min=1)


class CentreHead(nn.Module):
    """Centres of boxes as peaks of one map per class, and the box at each peak (CenterPoint, arXiv 2006.11275).

    Yaw is relative to the ray from the ego to the cell, as in monocular detectors: this is the angle that determines
    what a box looks like, wherever it is around the ego.

    Args:
        dim: E, of the view.
        classes: how many.
        bev_size: (H, W) of the view.
        pc_range: of the view, in metres.
        most: boxes of a sample at most.
        box_weight: of the boxes' loss; that of the peaks is 1. yaw_weight: of sine and cosine of the yaw in it.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        bev_size: tuple[int, int],
        pc_range: Sequence[float],
        most: int = 100,
        box_weight: float = 0.5,
        yaw_weight: float = 1.0,
    ):
        super().__init__()
        H, W = bev_size
        self.most, self.box_weight = most, box_weight
        self.code_weights = (*CODE_WEIGHTS[:6], yaw_weight, yaw_weight, *CODE_WEIGHTS[8:])
        self.low = pc_range[:2]
        self.cell = (pc_range[3] - pc_range[0]) / W, (pc_range[4] - pc_range[1]) / H  # metres
        self.shared = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.peaks = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, classes, 1))
        # offset x, y in cells; z; log of length, width, height; sin, cos of the yaw from the ray; velocity x, y
        self.codes = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, 10, 1))
        nn.init.constant_(self.peaks[-1].bias, -math.log(99))  # a probability of 0.01

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared(view)
        return to_full_precision((self.peaks(x), self.codes(x)))  # logits (B, classes, H, W), (B, 10, H, W)

    def place(self, boxes: Tensor) -> Tensor:
        """Return the positions of boxes in cells, x and y, (n, 2)."""
        return (boxes[:, :2] - boxes.new_tensor(self.low)) / boxes.new_tensor(self.cell)

    def ray(self, cells: Tensor) -> Tensor:
        """Return the direction of cells (n, 2), x and y, seen from the ego, in radians from the x axis, (n, 1)."""
        x, y = ((cells + 0.5) * cells.new_tensor(self.cell) + cells.new_tensor(self.low)).split(1, 1)
        return torch.atan2(y, x)

    def heat(self, boxes: Tensor, labels: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return (classes, H, W): a Gaussian around the cell of every centre, where it is 1, as wide as the box."""
        heat = boxes.new_zeros(shape)
        at = self.place(boxes).floor()
        y, x = torch.arange(shape[1], device=boxes.device), torch.arange(shape[2], device=boxes.device)
        wide = (boxes[:, 3:5].amin(1) / min(self.cell) / 3).clamp(min=0.6)
        for (column, row), spread, label in zip(at, wide, labels):
            far = (x - column).square() + (y - row).square()[:, None]
            heat[label] = torch.maximum(heat[label], torch.exp(-far / (2 * spread.square())))
        return heat

    def loss(
        self, outputs: tuple[Tensor, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        logits, codes = outputs
        _, H, W = logits.shape[1:]
        heat, wanted, predicted, count = [], [], [], 0
        for code, own, kinds in zip(codes, boxes, labels):
            at = self.place(own)
            inside = ((at >= 0) & (at < at.new_tensor([W, H]))).all(1)
            own, kinds, at = own[inside], kinds[inside], at[inside]
            heat.append(self.heat(own, kinds, logits.shape[1:]))
            x, y = at.floor().long().unbind(1)
            predicted.append(code[:, y, x].T)
            yaw = own[:, 6:7] - self.ray(at.floor())
            wanted.append(
                torch.cat([at - at.floor(), own[:, 2:3], own[:, 3:6].log(), yaw.sin(), yaw.cos(), own[:, 7:]], 1)
            )
            count += len(own)
        heat = torch.stack(heat)
        # Penalty-reduced focal loss (CornerNet, arXiv 1808.01244).
        p, log, rest = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
        peaks = -torch.where(heat == 1, (1 - p).square() * log, (1 - heat) ** 4 * p.square() * rest).sum()
        off = (torch.cat(predicted) - torch.cat(wanted)).abs() * logits.new_tensor(self.code_weights)
        return dict(peaks=peaks / max(1, count), boxes=self.box_weight * off.sum() / max(1, count))

    def boxes(self, outputs: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        logits, codes = outputs
        W = logits.shape[3]
        p = logits.sigmoid()
        p = torch.where(F.max_pool2d(p, 3, 1, 1) == p, p, 0.0)  # keep local maxima
        detections = []
        for scores, code in zip(p, codes):
            score, index = scores.flatten().topk(min(self.most, scores.numel()))
            label, cell = index // scores[0].numel(), index % scores[0].numel()
            c = code.flatten(1)[:, cell].T
            cells = torch.stack([cell % W, cell // W], 1).to(c)
            at = cells + c[:, :2]
            at = at * at.new_tensor(self.cell) + at.new_tensor(self.low)
            yaw = torch.atan2(c[:, 6:7], c[:, 7:8]) + self.ray(cells)
            yaw = torch.remainder(yaw + math.pi, 2 * math.pi) - math.pi
            box = torch.cat([at, c[:, 2:3], c[:, 3:6].clamp(-5, 5).exp(), yaw, c[:, 8:]], 1)
            detections.append((box, score, label))
        return detections


def inverse_sigmoid(p: Tensor) -> Tensor:
    """Return the logit, with p and 1 - p each clamped to at least 1e-5."""
    return (p.clamp(min=1e-5) / (1 - p).clamp(min=1e-5)).log()


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to the view around their reference points, an MLP; post-norm."""

    def __init__(self, dim: int, heads: int, points: int, hidden: int, drop: float):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, drop, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.cross = DeformableAttention(dim, heads, 1, points, depth=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, act_layer=nn.ReLU, drop=drop)
        self.norm3 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, position: Tensor, view: Tensor, shape: tuple[int, int], reference: Tensor) -> Tensor:
        q = x + position  # (B, Q, E)
        x = self.norm1(x + self.drop(self.attn(q, q, x, need_weights=False)[0]))
        x = self.norm2(x + self.drop(self.proj(self.cross(x + position, view, None, [shape], reference[:, :, None]))))
        return self.norm3(x + self.mlp(x))


class DecoderHead(nn.Module):
    """DETR's decoder over the view, as in BEVFormer: queries that become boxes, refined layer by layer.

    The loss uses a one-to-one matching (SciPy's Hungarian algorithm) at every layer.

    Args:
        dim: E, of the view. classes: how many. bev_size, pc_range: of the view.
        queries: how many. layers, heads, points, hidden: of the decoder. most: boxes of a sample at most.
        margin: metres beyond pc_range that a box's middle may be off, in x and y.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        bev_size: tuple[int, int],
        pc_range: Sequence[float],
        queries: int = 900,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        hidden: int = 512,
        drop: float = 0.1,
        most: int = 300,
        margin: float = 10.0,
    ):
        super().__init__()
        self.shape, self.most, self.margin, self.classes = tuple(bev_size), most, margin, classes
        self.low, self.high = pc_range[:3], pc_range[3:]
        self.query = nn.Embedding(queries, 2 * dim)
        self.reference = nn.Linear(dim, 3)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, points, hidden, drop) for _ in range(layers))

        def branch(outputs: int, norm: bool) -> nn.Sequential:
            hidden = [m for _ in range(2) for m in (nn.Linear(dim, dim), *([nn.LayerNorm(dim)] * norm), nn.ReLU())]
            return nn.Sequential(*hidden, nn.Linear(dim, outputs))

        self.kinds = nn.ModuleList(branch(classes, True) for _ in range(layers))
        self.codes = nn.ModuleList(branch(10, False) for _ in range(layers))
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.layers:
            layer.cross.init_weights()
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)
        for kind in self.kinds:
            nn.init.constant_(kind[-1].bias, -math.log(99))

    def forward(self, view: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return per layer class logits (B, Q, classes) and codes (B, Q, 10): (cx, cy, log w, log l, cz, log h, sin and
        cos of the yaw, vx, vy), in metres."""
        B = len(view)
        flat = view.flatten(2).mT
        position, x = self.query.weight.expand(B, -1, -1).chunk(2, -1)
        where = to_full_precision(self.reference(position)).sigmoid()
        out = []
        low, high = where.new_tensor(self.low), where.new_tensor(self.high)
        for layer, kind, branch in zip(self.layers, self.kinds, self.codes):
            x = layer(x, position, flat, self.shape, where)
            code = to_full_precision(branch(x))
            at = (code[..., [0, 1, 4]] + inverse_sigmoid(where)).sigmoid()
            metres = at * (high - low) + low
            code = torch.cat([metres[..., :2], code[..., 2:4], metres[..., 2:], code[..., 5:]], -1)
            out.append((to_full_precision(kind(x)), code))
            where = at.detach()
        return out

    @staticmethod
    def encode(boxes: Tensor) -> Tensor:
        x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
        return torch.stack([x, y, width.log(), length.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy], -1)

    @torch.no_grad()
    def match(self, logits: Tensor, codes: Tensor, wanted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Match queries to boxes with the least total cost; return (queries, boxes). The cost is as published: 2 times
        focal, 0.25 times L1 of the first eight numbers."""
        from scipy.optimize import linear_sum_assignment

        p = logits.sigmoid()
        yes = -(p + 1e-12).log() * 0.25 * (1 - p).square()
        no = -(1 - p + 1e-12).log() * 0.75 * p.square()
        cost = 2.0 * (yes - no)[:, labels] + 0.25 * torch.cdist(codes[:, :8], wanted[:, :8], p=1)
        rows, columns = linear_sum_assignment(cost.nan_to_num(1e4, 1e4, -1e4).cpu().numpy())
        return torch.as_tensor(rows, device=logits.device), torch.as_tensor(columns, device=logits.device)

    def loss(
        self, outputs: list[tuple[Tensor, Tensor]], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses. Boxes with a centre outside pc_range in x or y, which no reference point can reach, do not
        count.

        Sums are divided by the mean number of boxes over all processes, at least 1.
        """
        low, high = self.low[:2], self.high[:2]
        inside = [((b[:, :2] > b.new_tensor(low)) & (b[:, :2] < b.new_tensor(high))).all(1) for b in boxes]
        boxes, labels = ([part[kept] for part, kept in zip(parts, inside)] for parts in (boxes, labels))
        wanted = [self.encode(own) for own in boxes]
        total = torch.tensor(float(sum(map(len, boxes))), device=outputs[0][0].device)
        count = max(1.0, float(all_reduce_sum(total)) / world_size())
        losses: dict[str, Tensor] = {}
        for i, (logits, codes) in enumerate(outputs):
            target, off = torch.zeros_like(logits), codes.sum() * 0
            for b, (want, kinds) in enumerate(zip(wanted, labels)):
                rows, columns = self.match(logits[b], codes[b], want, kinds)
                target[b, rows, kinds[columns]] = 1
                off = off + ((codes[b, rows] - want[columns]).abs() * self.code_weights).sum()
            name = "" if i == len(outputs) - 1 else f"_{i}"
            losses[f"classes{name}"] = 2.0 * sigmoid_focal_loss(logits, target, 0.25, 2.0, "sum") / count
            losses[f"boxes{name}"] = 0.25 * off / count
        return losses

    def boxes(self, outputs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        detections = []
        for logits, codes in zip(*outputs[-1]):
            score, index = logits.sigmoid().flatten().topk(min(self.most, logits.numel()))
            c = codes[index // self.classes]
            x, y, width, length, z, height, sin, cos, vx, vy = c.unbind(-1)
            size = [t.exp() for t in (length, width, height)]
            box = torch.stack([x, y, z, *size, torch.atan2(sin, cos), vx, vy], -1)
            low, high = c.new_tensor(self.low[:2]) - self.margin, c.new_tensor(self.high[:2]) + self.margin
            kept = ((box[:, :2] >= low) & (box[:, :2] <= high)).all(1)
            detections.append((box[kept], score[kept], index[kept] % self.classes))
        return detections


HEAD_KEYS: Rules = [  # published name of an entry of the head -> DecoderHead's, applied in order
    (r"^pts_bbox_head\.query_embedding\.", "query."),
    (r"^pts_bbox_head\.cls_branches\.", "kinds."),
    (r"^pts_bbox_head\.reg_branches\.", "codes."),
    (r"^pts_bbox_head\.transformer\.reference_points\.", "reference."),
    (r"^pts_bbox_head\.transformer\.decoder\.", ""),
    (r"\.attentions\.0\.attn\.", ".attn."),
    (r"\.attentions\.1\.output_proj\.", ".proj."),
    (r"\.attentions\.1\.", ".cross."),
    *ENCODER_KEYS,
]


def from_published(tensors: dict[str, Tensor], net: BevDetector) -> dict[str, Tensor]:
    """Convert a published detector's tensors to those of a detector with its backbone and decoder.

    The published angle r is -yaw - pi/2: its sine is -cos(yaw) and its cosine -sin(yaw), so that two rows of the last
    layers change places and signs. The weights of the loss, which such a file has too, are set.
    """
    converted = {f"lifter.{key}": value for key, value in convert(tensors, net.lifter).items()}
    for key, value in tensors.items():
        if key == "pts_bbox_head.code_weights" and value.shape == net.head.code_weights.shape:
            net.head.code_weights.copy_(value)
        elif rename(key).startswith("pts_bbox_head."):  # not of the lifter
            if re.search(r"reg_branches\.\d+\.4\.", key) and len(value) == 10:
                value = torch.cat([value[:6], -value[7:8], -value[6:7], value[8:]])
            converted[f"head.{rename_key(key, HEAD_KEYS)}"] = value
    return converted


HEADS = dict(centre=CentreHead, decoder=DecoderHead)


def make_head(kind: str, lifter: nn.Module, classes: int, **kwargs: Any) -> nn.Module:
    """Build the head of a task's section for a lifter. Raises UserError for an unknown argument."""
    from ..runtime.config import check

    given = ("dim", "classes", "bev_size", "pc_range")
    check("task.head_args", kwargs, HEADS[kind], without=given)
    return HEADS[kind](lifter.num_features, classes, lifter.bev_size, lifter.pc_range, **kwargs)
