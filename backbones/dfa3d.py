"""DFA3D-BEV: images of several cameras lifted to a bird's-eye view by 3D deformable attention.

Paper: "DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting", ICCV 2023, arXiv 2307.12972, on BEVFormer's
encoder (arXiv 2203.17270). Published code: IDEA-Research/3D-deformable-attention@cc38675, for non-commercial use only:
this file is written from a description of it, and equals it in float64. The published weights load
(`checkpoint_filter_fn`). The published image backbone is resnet_dcn's; any backbone of timm can replace it.

Frames. The view's frame is the caller's, metres, z up: nuScenes' LiDAR has x to the right and y ahead. Cell (i, j) of
the map (B, E, H, W), row i, column j, is the column of air over y_min + (i + 0.5) · (y_max - y_min) / H and
x_min + (j + 0.5) · (x_max - x_min) / W. Pixel (u, v) of an image has its centre at (u + 0.5, v + 0.5), so that an image
spans 0 to W and 0 to H.

With a batch of several samples, each looks through its own cameras and at its own previous frame; the published code
does so for one sample only, where the two are equal.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork

from ..ops import dfa3d, ms_deform_attn
from ..ops.dispatch import is_saved_graph, is_transformed
from ..ops.precision import full, no_autocast
from .attention_maps import AttentionMap, HasAttentionMaps, SamplingMap, describe
from .base import create_model
from .dfa3d_depth import DepthHead, depth_bins, depth_target
from .published import Rules, rename_key
from .resnet_dcn import MEAN, STD, ResNetDCN

NEAR = 1e-5  # metres in front of a camera, beyond which a point is visible


def make_pillars(bev_size: tuple[int, int], pc_range: Sequence[float], points: int, like: Tensor) -> Tensor:
    """Return points over the centre of every cell, from half a metre above the range's floor to as much below its top:
    (H · W, points, 3) in metres, in `like`'s type."""
    height, width = bev_size
    low, high = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in (pc_range[:3], pc_range[3:]))
    tall = float(pc_range[5] - pc_range[2])
    dd: dict[str, Any] = dict(dtype=like.dtype, device=like.device)
    z = torch.linspace(0.5, tall - 0.5, points, **dd) / tall
    y = (torch.arange(height, **dd) + 0.5) / height
    x = (torch.arange(width, **dd) + 0.5) / width
    grid = torch.stack(torch.broadcast_tensors(x[None, :, None], y[:, None, None], z[None, None]), -1)
    return grid.flatten(0, 1) * (high - low) + low


def project(
    points: Tensor, lidar2img: Tensor, size: tuple[int, int], depth_bound: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Project points into the cameras.

    points (Q, Z, 3) in metres, lidar2img (B, N, 4, 4) to (u · d, v · d, d, 1) in pixels and metres, size (H, W) of the
    images. Returns (u / W, v / H, (d - nearest) / (farthest - nearest)), (B, N, Q, Z, 3), and which are seen
    (B, N, Q, Z): before the camera and within its image, whatever their depth.
    """
    with no_autocast(lidar2img):
        matrix = lidar2img.to(points.dtype)
        u, v, d = (points @ matrix[:, :, None, :3, :3].transpose(-2, -1) + matrix[:, :, None, None, :3, 3]).unbind(-1)
        away = d.clamp(min=NEAR)
        u, v = u / away / size[1], v / away / size[0]
        seen = (d > NEAR) & (u > 0) & (u < 1) & (v > 0) & (v < 1)
        return torch.stack([u, v, (d - depth_bound[0]) / (depth_bound[1] - depth_bound[0])], -1), seen


def as_tensor(sizes: list[tuple[int, ...]], like: Tensor) -> Tensor:
    """Return sizes as a tensor, in float32 at least; in a traced graph they stay those of the image."""
    dd: dict[str, Any] = dict(dtype=full(like), device=like.device)
    if torch.jit.is_tracing():
        return torch.stack([torch.stack([torch.as_tensor(n).to(**dd) for n in size]) for size in sizes])
    return torch.tensor(sizes, **dd)


def sampling_directions(heads: int) -> Tensor:
    """Return one direction per head, evenly around the circle, with 1 as the larger coordinate: (heads, 2)."""
    angle = 2 * math.pi / heads * torch.arange(heads)
    grid = torch.stack([angle.cos(), angle.sin()], -1)
    return grid / grid.abs().amax(-1, keepdim=True)


class DeformableAttention(nn.Module):
    """Deformable attention of queries to maps of several sizes, around reference points; in depth too if `depth`.

    Args:
        dim: E, of queries and maps.
        heads: M.
        levels: L maps.
        points: P samples a level.
        depth: sampled in 3D; else the third coordinate plays no part.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, depth: bool):
        super().__init__()
        if dim % heads:
            raise ValueError(f"embed_dims must be a multiple of heads={heads}, got {dim}")
        self.heads, self.levels, self.points = heads, levels, points
        samples = heads * levels * points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.sampling_offsets_depth = nn.Linear(dim, samples) if depth else None
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        far = torch.arange(1.0, self.points + 1)
        grid = sampling_directions(self.heads)[:, None, None, :] * far[:, None]  # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(grid.expand(-1, self.levels, -1, -1).flatten())
        if self.sampling_offsets_depth is not None:
            angle = 2 * math.pi / self.heads * torch.arange(self.heads)
            deep = ((angle.cos() + angle.sin()) / 2)[:, None, None] * far
            nn.init.xavier_uniform_(self.sampling_offsets_depth.weight)
            self.sampling_offsets_depth.bias.copy_(deep.expand(-1, self.levels, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.zeros_(self.value_proj.bias)

    def sample(
        self, query: Tensor, value: Tensor, depth: Tensor | None, shapes: list[tuple[int, int]], reference: Tensor
    ) -> tuple[Tensor, Tensor | None, list, Tensor, Tensor]:
        """Compute the operator's arguments; see `forward`."""
        split = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2))
        sizes: list[tuple[int, ...]] = [(W, H) for H, W in shapes]
        if depth is not None:
            offsets = torch.cat([offsets, self.sampling_offsets_depth(query).unflatten(-1, (*split, 1))], -1)  # type: ignore[misc]
            sizes = [(W, H, depth.shape[-1]) for H, W in shapes]
        dims = offsets.shape[-1]
        Z = reference.shape[2]
        # In float32 at least: a bfloat16 coordinate is off by whole cells.
        offsets = offsets.to(full(offsets)) / as_tensor(sizes, offsets)[:, None]
        around = reference[:, :, None, None, None, :, :dims]  # point p goes with anchor p mod Z
        locations = (offsets.unflatten(-2, (-1, Z)) + around).flatten(-3, -2)
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, split[1:])
        value = self.value_proj(value).unflatten(-1, (self.heads, -1))
        return value, depth if depth is None else depth[:, :, None], shapes, locations, weights

    def forward(
        self, query: Tensor, value: Tensor, depth: Tensor | None, shapes: list[tuple[int, int]], reference: Tensor
    ) -> Tensor:
        """query (B, Q, E), value (B, S, E) with S = Σ H·W of shapes, depth (B, S, D), reference (B, Q, Z, 3) from 0 to
        1 -> (B, Q, E), of all heads, not yet projected."""
        value, depth, shapes, locations, weights = self.sample(query, value, depth, shapes, reference)
        if depth is None:
            return ms_deform_attn(value, shapes, locations, weights)
        return dfa3d(value, depth, shapes, locations, weights)


class SpatialCrossAttention(nn.Module):
    """Attention of each cell of the view to the cameras that see part of the column of air above it.

    Only these queries are gathered, per sample and camera; what the cameras give is averaged over those that see.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, depth: bool, drop: float):
        super().__init__()
        self.deformable_attention = DeformableAttention(dim, heads, levels, points, depth)
        self.output_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(drop)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        depth: Tensor | None,
        shapes: list[tuple[int, int]],
        reference: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """query (B, Q, E), value (B, N, S, E), depth (B, N, S, D), reference (B, N, Q, Z, 3), seen (B, N, Q, Z) ->
        (B, Q, E), the query added."""
        N, Z = reference.shape[1], reference.shape[3]
        here = seen.any(-1)  # (B, N, Q)
        # A graph that is saved must do for all cameras: there, and where no value can be read, every query looks
        # through every one.
        unknown = is_saved_graph() or is_transformed() or here.is_meta or here.numel() == 0
        most = here.shape[2] if unknown else int(here.sum(-1).max())
        slots = torch.zeros_like(query)
        if most:
            order = here.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)  # those that see, first
            index = order[..., :most]
            kept = here.gather(-1, index)
            rows = index[..., None].expand(-1, -1, -1, query.shape[-1])
            looking = query[:, None].expand(-1, N, -1, -1).gather(2, rows)
            around = reference.gather(2, index[..., None, None].expand(-1, -1, -1, Z, 3))
            out = self.deformable_attention(
                looking.flatten(0, 1),
                value.flatten(0, 1),
                None if depth is None else depth.flatten(0, 1),
                shapes,
                around.flatten(0, 1),
            ).unflatten(0, (query.shape[0], N))
            out = torch.where(kept[..., None], out, 0.0).to(slots.dtype)
            for camera in range(N):  # within one, no cell comes twice: the sum is the same in every run
                slots = slots.scatter_add(1, rows[:, camera], out[:, camera])
        return self.dropout(self.output_proj(slots / here.sum(1).clamp(min=1)[..., None])) + query


class TemporalSelfAttention(nn.Module):
    """Attention of each cell of the view to its surroundings in the previous view and in the current one."""

    def __init__(self, dim: int, heads: int, points: int, drop: float):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(2 * dim, 2 * heads * points * 2)
        self.attention_weights = nn.Linear(2 * dim, 2 * heads * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(drop)
        with torch.no_grad():
            grid = sampling_directions(heads)[:, None, None, :] * torch.arange(1.0, points + 1)[:, None]  # (M, 1, P, 2)
            self.sampling_offsets.bias.copy_(grid.expand(-1, 2, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        frames: tuple[Tensor, Tensor] | None,
        shape: tuple[int, int],
        where: Tensor,
    ) -> Tensor:
        """query (B, Q, E), position (Q, E) or (B, Q, E) added to it, frames: the previous view and the present one
        (B, Q, E) each, None: both are the query; where (B, Q, 2): each cell's place in the frames, from 0 to 1 ->
        (B, Q, E), the query added."""
        B = query.shape[0]
        before, present = (query, query) if frames is None else frames
        locations, weights = self.sample(torch.cat([before, query + position], -1), shape, where)
        value = self.value_proj(torch.stack([before, present])).unflatten(-1, (self.heads, -1)).flatten(0, 1)
        out = ms_deform_attn(value, [shape], locations, weights)
        return self.dropout(self.output_proj(out.unflatten(0, (2, B)).mean(0))) + query

    def sample(self, asking: Tensor, shape: tuple[int, int], where: Tensor) -> tuple[Tensor, Tensor]:
        """Compute locations (2·B, Q, M, 1, P, 2), the previous frame first, and weights (2·B, Q, M, 1, P)."""
        split = (self.heads, 2, self.points)
        offsets = self.sampling_offsets(asking).unflatten(-1, (*split, 2)).permute(3, 0, 1, 2, 4, 5)  # frames first
        weights = self.attention_weights(asking).unflatten(-1, split).softmax(-1).permute(3, 0, 1, 2, 4)
        size = torch.tensor(shape[::-1], dtype=full(offsets), device=asking.device)
        locations = (offsets.to(full(offsets)) / size + where[:, :, None, None]).flatten(0, 1)
        return locations[:, :, :, None], weights.flatten(0, 1)[:, :, :, None]


class EncoderLayer(nn.Module):
    """Attention over time, over the cameras, and an MLP, each a residual with LayerNorm after it."""

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, tsa_points: int, hidden: int, depth: bool, drop: float
    ):
        super().__init__()
        self.tsa = TemporalSelfAttention(dim, heads, tsa_points, drop)
        self.norm1 = nn.LayerNorm(dim)
        self.sca = SpatialCrossAttention(dim, heads, levels, points, depth, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, act_layer=nn.ReLU, drop=drop)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, query, position, frames, shape, where, value, depth, shapes, reference, seen) -> Tensor:
        query = self.norm1(self.tsa(query, position, frames, shape, where))
        query = self.norm2(self.sca(query, value, depth, shapes, reference, seen))
        return self.norm3(query + self.mlp(query))


def weigh_cells(depth: Tensor | None, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Return the weight of each cell of all levels in deformable attention, (B, Q, M, S).

    depth (B, S, D) or None, locations (B, Q, M, L, P, 2 or 3), weights (B, Q, M, L, P): as of the operator.
    """
    wide = full(locations)
    levels = []
    start = 0
    for level, (H, W) in enumerate(shapes):
        place, weight = locations[:, :, :, level].to(wide), weights[:, :, :, level].to(wide)
        x, y = place[..., 0] * W - 0.5, place[..., 1] * H - 0.5
        cells = weight.new_zeros(*weight.shape[:3], H * W)
        for row in (y.floor(), y.floor() + 1):
            for column in (x.floor(), x.floor() + 1):
                share = weight * (1 - (y - row).abs()) * (1 - (x - column).abs())
                inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
                cell = torch.where(inside, row * W + column, 0).long()
                if depth is not None:
                    bins = depth.shape[2]
                    z = place[..., 2] * bins - 0.5
                    hats = (1 - (z[..., None] - torch.arange(bins, device=z.device)).abs()).clamp(min=0)
                    image = torch.arange(len(depth), device=z.device)[:, None, None, None]
                    share = share * (hats * depth[image, start + cell].to(wide)).sum(-1)
                cells.scatter_add_(3, cell, torch.where(inside, share, 0.0))
        levels.append(cells)
        start += H * W
    return torch.cat(levels, 3)


def _table(
    locations: Tensor, weights: Tensor, sources: Tensor
) -> dict[str, Tensor]:  # (N, M, L, P, 2 or 3), (N, M, L, P)
    """Return the samples of one query as `SamplingMap.samples` does, of the sources numbered `sources`."""
    place, weight = locations[sources], weights[sources]
    source, head, level, _ = torch.meshgrid(sources, *map(torch.arange, weight.shape[1:]), indexing="ij")
    columns = dict(source=source, level=level, head=head, weight=weight)
    columns |= dict(zip("xyz", place.unbind(-1)))
    return {name: column.flatten() for name, column in columns.items()}


@describe.register(EncoderLayer)
def _(
    layer: EncoderLayer,
    query: Tensor,
    position: Tensor,
    frames: tuple[Tensor, Tensor] | None,
    shape: tuple[int, int],
    where: Tensor,
    value: Tensor,
    depth: Tensor | None,
    shapes: list[tuple[int, int]],
    reference: Tensor,
    seen: Tensor,
) -> Iterator[AttentionMap]:
    """time: where a cell of the view samples the previous view (source 0) and the present one (1); cameras: where it
    samples the cameras' maps. Weights of cameras are products with the depth's, and do not sum to 1."""
    tsa, sca = layer.tsa, layer.sca
    B = len(query)
    before, present = (query, query) if frames is None else frames
    asking = torch.cat([before, query + position], -1)
    moved = tsa.value_proj(torch.stack([before, present], 1)).unflatten(-1, (tsa.heads, -1))  # (B, 2, Q, M, C)

    def times(index: Tensor) -> tuple[Tensor, Tensor]:
        return tsa.sample(asking[:, index], shape, where[:, index])

    def weigh_times(index: Tensor) -> Tensor:
        cells = weigh_cells(None, [shape], *times(index.to(query.device))).unflatten(0, (2, B))
        return cells.permute(1, 3, 2, 0, 4).flatten(3) / 2

    def times_of(image: int, index: int) -> dict[str, Tensor]:
        locations, weights = (t.unflatten(0, (2, B))[:, image, 0] for t in times(torch.tensor([index])))
        return _table(locations, weights, torch.arange(2))

    yield SamplingMap(
        kind="time", grid=shape, query_grid=shape, heads=tsa.heads, images=B, weights=weigh_times, normalized=False,
        values=moved.permute(0, 3, 1, 2, 4).flatten(2, 3), sources=2, shapes=[shape], points=times_of,
    )  # fmt: skip

    query = layer.norm1(tsa(query, position, frames, shape, where))
    attention, N = sca.deformable_attention, reference.shape[1]
    bins = None if depth is None else depth.flatten(0, 1)
    looking = seen.any(-1)  # (B, N, Q)
    cells = attention.value_proj(value).unflatten(-1, (attention.heads, -1))  # (B, N, S, M, C)

    def cameras(index: Tensor) -> tuple[Tensor, Tensor]:
        asking = query[:, None, index].expand(-1, N, -1, -1).flatten(0, 1)
        around, empty = reference[:, :, index].flatten(0, 1), value.flatten(0, 1)[:, :0]
        return attention.sample(asking, empty, bins, shapes, around)[3:]

    def weigh_cameras(index: Tensor) -> Tensor:
        index = index.to(query.device)
        weights = weigh_cells(bins, shapes, *cameras(index)).unflatten(0, (B, N))
        look = looking[:, :, index]
        share = look / look.sum(1, keepdim=True).clamp(min=1)  # the mean over the cameras that see the cell
        return (weights * share[..., None, None]).permute(0, 3, 2, 1, 4).flatten(3)

    def cameras_of(image: int, index: int) -> dict[str, Tensor]:
        locations, weights = (t.unflatten(0, (B, N))[image, :, 0] for t in cameras(torch.tensor([index])))
        return _table(locations, weights, looking[image, :, index].nonzero()[:, 0].cpu())

    yield SamplingMap(
        kind="cameras", grid=shapes[0], query_grid=shape, heads=attention.heads, images=B, weights=weigh_cameras,
        normalized=False, values=cells.permute(0, 3, 1, 2, 4).flatten(2, 3), sources=N, shapes=shapes,
        points=cameras_of,
    )  # fmt: skip


class Encoder(nn.Module):
    """Compute the view from the cameras' maps, layer by layer."""

    def __init__(self, count: int, **layer: Any):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(**layer) for _ in range(count))
        self.grad_checkpointing = False

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        before: Tensor | None,
        shift: Tensor,
        shape: tuple[int, int],
        value: Tensor,
        depth: Tensor | None,
        shapes: list[tuple[int, int]],
        reference: Tensor,
        seen: Tensor,
        scene_start: Tensor | None = None,
    ) -> Tensor:
        """As the layers' arguments; before (B, Q, E), the previous view, turned as the present one, or None; shift
        (B, 2): how far (x, y) the cells have moved since, from 0 to 1 over the map; scene_start (B,) bool: True where
        there is no previous view. -> (B, Q, E).

        The present frame of the first layer is that of all layers, as published; with no previous view it is each
        layer's own. All look at shifted places, also in the present frame, as published.
        """
        H, W = shape
        dd: dict[str, Any] = dict(dtype=full(query), device=query.device)
        y, x = (torch.arange(H, **dd) + 0.5) / H, (torch.arange(W, **dd) + 0.5) / W
        cells = torch.stack(torch.broadcast_tensors(x[None], y[:, None]), -1).flatten(0, 1)
        where = cells + shift.to(cells)[:, None]  # (B, Q, 2)
        frames = None if before is None else (before, query)
        first = query
        for layer in self.layers:
            if before is not None and scene_start is not None:
                is_first = scene_start[:, None, None]
                frames = torch.where(is_first, query, before), torch.where(is_first, query, first)
            arguments = (position, frames, shape, where, value, depth, shapes, reference, seen)
            if self.grad_checkpointing and self.training:
                query = checkpoint(layer, query, *arguments, use_reentrant=False)
            else:
                query = layer(query, *arguments)
        return query


def align(view: Tensor, yaw: Tensor, center: tuple[float, float] | None = None) -> Tensor:
    """Rotate the view (B, E, H, W) for a vehicle that has turned by yaw (B,) degrees, anticlockwise seen from above.

    x points to the right, y ahead. center: the point (x, y), in cells from the map's corner, that stays where it is;
    None: the middle. Nearest neighbours, zero outside the old view.
    """
    H, W = view.shape[2:]
    x0, y0 = (W / 2, H / 2) if center is None else center
    dd: dict[str, Any] = dict(dtype=full(yaw), device=view.device)
    cos, sin = (f(yaw.to(**dd).deg2rad())[:, None, None] for f in (torch.cos, torch.sin))
    x, y = torch.arange(W, **dd) + 0.5 - x0, (torch.arange(H, **dd) + 0.5 - y0)[:, None]
    column, row = (cos * x - sin * y + (x0 - 0.5)).round(), (sin * x + cos * y + (y0 - 0.5)).round()
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)  # (B, H, W)
    index = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long().flatten(1)
    turned = view.flatten(2).gather(2, index[:, None].expand(-1, view.shape[1], -1)).unflatten(2, (H, W))
    return torch.where(inside[:, None], turned, 0.0).to(view.dtype)


class ExtraLevel(nn.Module):
    """An extra level of a feature pyramid: a convolution of stride 2 on the last one."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class BEVLifter(HasAttentionMaps, nn.Module):
    """Map images of the cameras around a vehicle to its bird's-eye view.

    Args:
        backbone: "resnet101_dcn", the published one, or a timm model with feature maps, by name; backbone_args: its
            arguments (drop_path_rate, …); backbone_pretrained: with the weights that timm publishes.
        in_chans: channels of the images.
        strides: of the maps that are lifted, as many as levels; one twice the backbone's last is made by a convolution.
        depth_stride: of the map from which depth is estimated: one of them.
        embed_dims: E, of maps, queries and view.
        heads, points: of the attention over cameras; points a level. tsa_points: of that over time.
        layers: of the encoder.
        ffn: hidden width of its MLPs.
        bev_size: (H, W) of the view.
        pc_range: what it spans, (x_min, y_min, z_min, x_max, y_max, z_max) in metres.
        pillar: points over each cell's centre that are looked for in the images; points is a multiple of it.
        depth_bound: (nearest, farthest, bin) in metres, before a camera.
        depth_groups: see DepthHead; (): a probability a bin.
        depth_gain: what the depth distribution is multiplied by before it weights the features; published: 1. As it is
            spread over the bins, features begin as many times smaller than without depth; a gain of about the bins'
            number makes up for that, and they are learned sooner.
        cell_noise: how the cells' embeddings begin: published, 1, each from N(0, 1). Less: as one vector for all, plus
            that much noise, so that lifted features, which begin small, stand out from it.
        offset_scale: what the attention's first offsets are multiplied by, which lie up to `points` cells of a map
            apart; published: 1. On small maps, whose cells are metres wide, less keeps them on the object.
        lift_depth: False: 2D deformable attention, with no depth, as BEVFormer has it.
        depth_network: False: none; `depth` is given to forward.
        cams: cameras that have an embedding each; 0: none has, and there may be any number.
        can_bus: numbers that describe the ego's motion for `can_bus` of forward; 0: none.
        rotation_center: (x, y) in cells from the view's corner, about which the previous view is turned; None: the
            middle, where the ego is. Published models turn it about (100, 100), whatever their size.
        drop_rate: dropout in the encoder.
    """

    def __init__(
        self,
        backbone: str = "resnet101_dcn",
        backbone_args: dict[str, Any] | None = None,
        backbone_pretrained: bool = False,
        in_chans: int = 3,
        strides: tuple[int, ...] = (8, 16, 32, 64),
        depth_stride: int = 32,
        embed_dims: int = 256,
        heads: int = 8,
        points: int = 8,
        tsa_points: int = 4,
        layers: int = 6,
        ffn: int = 512,
        bev_size: tuple[int, int] = (200, 200),
        pc_range: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
        pillar: int = 4,
        depth_bound: tuple[float, float, float] = (2.0, 58.0, 0.5),
        depth_groups: tuple[int, ...] = (2, 4, 8),
        depth_gain: float = 1.0,
        cell_noise: float = 1.0,
        offset_scale: float = 1.0,
        lift_depth: bool = True,
        depth_network: bool = True,
        cams: int = 6,
        can_bus: int = 18,
        rotation_center: tuple[float, float] | None = None,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        if points % pillar:
            raise ValueError(f"points must be a multiple of pillar={pillar}, got {points}")
        if embed_dims % 2:
            raise ValueError(f"embed_dims must be even, got {embed_dims}")
        if len(pc_range) != 6 or any(low >= high for low, high in zip(pc_range, pc_range[3:])):
            raise ValueError(f"pc_range must be (x_min, y_min, z_min, x_max, y_max, z_max), got {pc_range}")
        if len(bev_size) != 2:
            raise ValueError(f"bev_size must be (height, width), got {bev_size}")
        if len(depth_bound) != 3:
            raise ValueError(f"depth_bound must be (nearest, farthest, bin), got {depth_bound}")
        if rotation_center is not None and len(rotation_center) != 2:
            raise ValueError(f"rotation_center must be (x, y) or None, got {rotation_center}")
        if depth_stride not in strides:
            raise ValueError(f"depth_stride must be one of strides={tuple(strides)}, got {depth_stride}")
        self.in_chans, self.num_classes, self.num_features = in_chans, 0, embed_dims
        self.strides, self.bev_size, self.pc_range = tuple(strides), (bev_size[0], bev_size[1]), tuple(pc_range)
        self.pillar, self.cams, self.can_bus = pillar, cams, can_bus
        self.depth_bound = (depth_bound[0], depth_bound[1], depth_bound[2])
        self.rotation_center, self.depth_gain = rotation_center, depth_gain

        is_published = backbone == "resnet101_dcn"
        if is_published and backbone_pretrained:
            raise ValueError(
                "backbone_pretrained must be False for resnet101_dcn, which timm does not publish, got True"
            )
        arguments: dict[str, Any] = dict(in_chans=in_chans) | (backbone_args or {})
        if is_published:
            reductions = list(ResNetDCN.strides)
        else:
            arguments = dict(features_only=True, pretrained=backbone_pretrained) | arguments
            reductions = timm.create_model(backbone, **arguments | dict(pretrained=False)).feature_info.reduction()
        own = [stride for stride in self.strides if stride in reductions]
        if list(self.strides) not in (own, [*own, 2 * reductions[-1]]):
            raise ValueError(
                f"strides must be some of {backbone}'s {reductions}, and may end with one more, got {strides}"
            )
        if is_published:
            self.backbone: Any = ResNetDCN(own, **arguments)
            channels = self.backbone.channels
        else:
            self.backbone = timm.create_model(backbone, **arguments, out_indices=[reductions.index(s) for s in own])
            channels = self.backbone.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, embed_dims)
        self.extra = ExtraLevel(embed_dims) if len(own) < len(self.strides) else None

        bins = depth_bins(self.depth_bound)
        self.depth_level = self.strides.index(depth_stride)
        self.lift_depth, self.depth = lift_depth, None
        if lift_depth and depth_network:
            self.depth = DepthHead(embed_dims, embed_dims, bins, depth_groups)
        self.level_embed = nn.Parameter(torch.empty(len(self.strides), embed_dims))
        self.camera_embed = nn.Parameter(torch.empty(cams, embed_dims)) if cams else None
        H, W = self.bev_size
        self.query = nn.Parameter(torch.empty(H * W, embed_dims))
        self.row_embed = nn.Parameter(torch.empty(H, embed_dims // 2))
        self.column_embed = nn.Parameter(torch.empty(W, embed_dims // 2))
        self.can_bus_mlp = None
        if can_bus:
            self.can_bus_mlp = nn.Sequential(
                nn.Linear(can_bus, embed_dims // 2),
                nn.ReLU(),
                nn.Linear(embed_dims // 2, embed_dims),
                nn.ReLU(),
                nn.LayerNorm(embed_dims),
            )
        self.encoder = Encoder(
            layers,
            dim=embed_dims,
            heads=heads,
            levels=len(self.strides),
            points=points,
            tsa_points=tsa_points,
            hidden=ffn,
            depth=lift_depth,
            drop=drop_rate,
        )
        for embedding in (self.level_embed, self.camera_embed, self.query):
            if embedding is not None:
                nn.init.normal_(embedding)
        if cell_noise != 1:
            self.query.data.mul_(cell_noise).add_(torch.randn(embed_dims))
        nn.init.uniform_(self.row_embed)
        nn.init.uniform_(self.column_embed)
        if offset_scale != 1:
            for layer in self.encoder.layers:
                attention: Any = layer.sca.deformable_attention
                for linear in (attention.sampling_offsets, attention.sampling_offsets_depth):
                    if linear is not None:
                        linear.weight.data.mul_(offset_scale)
                        linear.bias.data.mul_(offset_scale)
        for mlp in (self.can_bus_mlp, *(layer.mlp for layer in self.encoder.layers)):
            for module in mlp.modules() if mlp is not None else ():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"level_embed", "camera_embed", "query", "row_embed", "column_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^backbone\.", blocks=[(r"^(?:fpn|extra|depth)\.", (0,)), (r"^encoder\.layers\.(\d+)", None)])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.grad_checkpointing = enable
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)

    def maps(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """images (B, N, in_chans, H, W) -> maps (B, N, E, H / stride, W / stride) of every level, and probabilities of
        the depth codes (B, N, codes, H / depth_stride, W / depth_stride) with which the depth loss is taken."""
        B, N = images.shape[:2]
        features = self.backbone(images.flatten(0, 1))
        maps = list(self.fpn({str(i): x for i, x in enumerate(features)}).values())
        if self.extra is not None:
            maps.append(self.extra(maps[-1]))
        codes = None if self.depth is None else self.depth(maps[self.depth_level]).unflatten(0, (B, N))
        return [x.unflatten(0, (B, N)) for x in maps], codes

    def lift(
        self,
        maps: list[Tensor],
        bins: Tensor | None,
        lidar2img: Tensor,
        size: tuple[int, int],
        prev_bev: Tensor | None = None,
        motion: Tensor | None = None,
        can_bus: Tensor | None = None,
        cameras: Tensor | None = None,
        scene_start: Tensor | None = None,
    ) -> Tensor:
        """maps as of `maps`, bins (B, N, D, h, w): a depth distribution, of whatever size; size (H, W) of the images;
        the rest as of `forward`."""
        B, N = maps[0].shape[:2]
        H, W = self.bev_size
        shapes = [tuple(x.shape[3:]) for x in maps]
        camera = 0 if self.camera_embed is None else self.camera_embed[:N, None]
        value = torch.cat(
            [x.flatten(3).transpose(-2, -1) + camera + level for x, level in zip(maps, self.level_embed)], 2
        )
        depth = None
        if self.lift_depth:
            depth = bins.flatten(0, 1) if self.depth_gain == 1 else self.depth_gain * bins.flatten(0, 1)
            depth = [depth if depth.shape[2:] == shape else F.interpolate(depth, shape) for shape in shapes]
            depth = torch.cat([d.flatten(2).transpose(-2, -1) for d in depth], 1).unflatten(0, (B, N))
        with no_autocast(lidar2img):
            like = lidar2img.new_empty(0, dtype=full(lidar2img))
            points = make_pillars(self.bev_size, self.pc_range, self.pillar, like)
            reference, seen = project(points, lidar2img, size, self.depth_bound)
        if cameras is not None:
            seen = seen & cameras[:, :, None, None]
        query = self.query.expand(B, -1, -1)
        if can_bus is not None:
            if self.can_bus_mlp is None:
                raise ValueError("can_bus needs a lifter that was made with can_bus=18 or as many numbers as it has")
            query = query + self.can_bus_mlp(can_bus)[:, None]
        column, row = self.column_embed.expand(H, -1, -1), self.row_embed[:, None].expand(-1, W, -1)
        position = torch.cat([column, row], -1).flatten(0, 1)
        shift = value.new_zeros(B, 2, dtype=like.dtype)
        before = None
        if prev_bev is not None:
            if motion is not None:
                span = motion.new_tensor([b - a for a, b in zip(self.pc_range[:2], self.pc_range[3:5])])
                shift = motion[:, :2] / span
                prev_bev = align(prev_bev, motion[:, 2], self.rotation_center)
                if scene_start is not None:
                    shift = torch.where(scene_start[:, None], 0.0, shift)
            before = prev_bev.flatten(2).transpose(-2, -1)
        out = self.encoder(query, position, before, shift, (H, W), value, depth, shapes, reference, seen, scene_start)
        return out.transpose(-2, -1).unflatten(2, (H, W))

    def forward(
        self,
        images: Tensor,
        lidar2img: Tensor,
        prev_bev: Tensor | None = None,
        motion: Tensor | None = None,
        can_bus: Tensor | None = None,
        cameras: Tensor | None = None,
        depth: Tensor | None = None,
        return_depth: bool = False,
        scene_start: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return the view (B, E, H_bev, W_bev).

        images     (B, N, in_chans, H, W) of N cameras, of any size, normalised as the backbone wants it.
        lidar2img  (B, N, 4, 4): from metres in the view's frame to (u · d, v · d, d, 1), with (u, v) in pixels of these
                   images, d in metres before the camera: intrinsics times extrinsics. Kept in float32 or float64.
        prev_bev   (B, E, H_bev, W_bev): the view that this model gave for the frame before.
        motion     (B, 3): since then the ego has moved by (x, y) metres, in the axes of the present view, and turned by
                   as many degrees, anticlockwise seen from above. Without it the views lie on each other as they are.
                   Published: of the ego's origin, not the LiDAR's, and as if the ground were level.
        can_bus    (B, can_bus): what else is known of the ego's motion; published: nuScenes' pose and CAN bus messages,
                   see saccade.train.data.nuscenes.
        cameras    (B, N) bool: False where a camera is missing, whatever its image holds (but NaN).
        depth      (B, N, H, W): metres before the camera where they are known, as of a LiDAR, else 0. It takes the
                   depth network's place: bins within two of the nearest in each cell are 1, others and unknown ones 0.
        return_depth
                   returns (view, codes): the depth network's probabilities; see `maps`.
        scene_start (B,) bool: True for samples that have no frame before; prev_bev and motion play no part in them.

        Raises ValueError for shapes that do not go together.
        """
        self._check(images, lidar2img, prev_bev, motion, can_bus, cameras, depth, scene_start)
        maps, codes = self.maps(images)
        bins = None
        if self.lift_depth and depth is not None:
            bins = self.depth_target(depth, tolerance=2)
        elif self.lift_depth:
            bins = self.depth.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        size = images.shape[3], images.shape[4]
        view = self.lift(maps, bins, lidar2img, size, prev_bev, motion, can_bus, cameras, scene_start)
        return (view, codes) if return_depth else view

    def depth_target(self, depth: Tensor, tolerance: int = 0) -> Tensor:
        """Convert depth (B, N, H, W) in metres, 0 if unknown, to a distribution (B, N, D, H / depth_stride, …)."""
        block = self.strides[self.depth_level]
        return depth_target(depth.flatten(0, 1), block, self.depth_bound, tolerance).unflatten(0, depth.shape[:2])

    def depth_codes(self, depth: Tensor) -> Tensor:
        """Targets for `maps`'s codes: (B, N, codes, H / depth_stride, W / depth_stride) of depth (B, N, H, W)."""
        return self.depth.encode(self.depth_target(depth).flatten(0, 1)).unflatten(0, depth.shape[:2])

    def _check(self, images, lidar2img, prev_bev, motion, can_bus, cameras, depth, scene_start) -> None:
        if images.dim() != 5 or images.shape[2] != self.in_chans:
            raise ValueError(f"images must be (B, cameras, {self.in_chans}, H, W), got {tuple(images.shape)}")
        B, N, _, H, W = images.shape
        if self.cams and self.cams < N:
            raise ValueError(f"images must be of at most {self.cams} cameras, which have an embedding each, got {N}")
        for name, t, shape in (
            ("lidar2img", lidar2img, (B, N, 4, 4)),
            ("prev_bev", prev_bev, (B, self.num_features, *self.bev_size)),
            ("motion", motion, (B, 3)),
            ("can_bus", can_bus, (B, self.can_bus)),
            ("cameras", cameras, (B, N)),
            ("depth", depth, (B, N, H, W)),
            ("scene_start", scene_start, (B,)),
        ):
            if t is not None and tuple(t.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if self.lift_depth and self.depth is None and depth is None:
            raise ValueError("depth must be given to a lifter that was made with depth_network=False, got None")


ENCODER_KEYS: Rules = [  # published name of an encoder's entry -> ours, applied in order
    (r"\.attentions\.0\.", ".tsa."),
    (r"\.attentions\.1\.", ".sca."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".mlp.fc2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.norms\.2\.", ".norm3."),
]
PUBLISHED_KEYS: Rules = [
    (r"^img_backbone\.", "backbone."),
    (r"^img_neck\.lateral_convs\.(\d+)\.conv\.", r"fpn.inner_blocks.\1.0."),
    (r"^img_neck\.fpn_convs\.(\d+)\.conv\.", r"fpn.layer_blocks.\1.0."),
    (r"^pts_dpt_head\.", "depth."),
    (r"^pts_bbox_head\.bev_embedding\.weight$", "query"),
    (r"^pts_bbox_head\.positional_encoding\.row_embed\.weight$", "row_embed"),
    (r"^pts_bbox_head\.positional_encoding\.col_embed\.weight$", "column_embed"),
    (r"^pts_bbox_head\.transformer\.level_embeds$", "level_embed"),
    (r"^pts_bbox_head\.transformer\.cams_embeds$", "camera_embed"),
    (r"^pts_bbox_head\.transformer\.can_bus_mlp\.norm\.", "can_bus_mlp.4."),
    (r"^pts_bbox_head\.transformer\.can_bus_mlp\.", "can_bus_mlp."),
    (r"^pts_bbox_head\.transformer\.encoder\.", "encoder."),
    *[(r"^(encoder\..*)" + pattern, r"\1" + ours) for pattern, ours in ENCODER_KEYS],
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; those of its head and our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def convert(state_dict: dict[str, Tensor], model: "BEVLifter") -> dict[str, Tensor]:
    """Convert a published detector's tensors to those of a lifter with its backbone; its head is left out.

    Published models have rows of level embeddings for levels that they do not have, and one with known depth a depth
    network that it does not use: both are left out.
    """
    taken = {ours: value for key, value in state_dict.items() if not (ours := rename(key)).startswith("pts_bbox_head.")}
    extra = f"fpn.layer_blocks.{len(model.fpn.inner_blocks)}.0."
    if model.extra is not None:
        taken = {key.replace(extra, "extra.conv."): value for key, value in taken.items()}
    if "level_embed" in taken:
        taken["level_embed"] = taken["level_embed"][: len(model.strides)]
    if (stem := taken.get("backbone.conv1.weight")) is not None and stem.ndim == 4:
        taken["backbone.conv1.weight"] = stem.flip(1)  # published images are BGR
    if model.depth is None:
        taken = {key: value for key, value in taken.items() if not key.startswith("depth.")}
    if not model.lift_depth:
        taken = {key: value for key, value in taken.items() if "sampling_offsets_depth" not in key}
    return taken


def checkpoint_filter_fn(state_dict: dict, model: BEVLifter) -> dict[str, Tensor]:
    """Convert weights of a published detector to ours, all of which must fit.

    Of a lifter with another backbone than the published one, the encoder and the depth network are taken; the rest is
    the model's own.
    """
    for container in ("state_dict", "model"):
        if isinstance(state_dict.get(container), dict):
            state_dict = state_dict[container]
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if not any(key.startswith("pts_bbox_head.") for key in state_dict):
        return state_dict
    own, taken = model.state_dict(), convert(state_dict, model)
    parts: tuple[str, ...] = ("",)
    if not isinstance(model.backbone, ResNetDCN):
        parts = ("encoder.", "depth.")
        taken = {key: value for key, value in taken.items() if key.startswith(parts)}
    wanted = [key for key in own if key.startswith(parts) and not key.endswith("num_batches_tracked")]
    for key in [*wanted, *(key for key in taken if key not in own)]:
        has, wants = (tuple(d[key].shape) if key in d else "missing" for d in (taken, own))
        if has != wants:
            raise ValueError(f"not the weights of this {type(model).__name__}: {key} is {has} there and {wants} here")
    return own | taken


def _cfg(height: int, width: int) -> dict:
    return dict(
        num_classes=0,
        input_size=(3, height, width),  # of each camera; published: (900, 1600), scaled and padded to multiples of 32
        pool_size=None,
        crop_pct=1.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        first_conv=None,
        classifier=None,
        license="IDEA License 1.0, non-commercial",  # of the published code and weights
        origin_url="https://github.com/IDEA-Research/3D-deformable-attention",
        paper_name="DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting",
        paper_ids="arXiv:2307.12972",
    )


VARIANTS: dict[str, dict[str, Any]] = dict(
    dfa3d_bev_s=dict(strides=(32,), bev_size=(150, 150), layers=3, rotation_center=(100.0, 100.0)),
    dfa3d_bev_b=dict(strides=(8, 16, 32, 64), bev_size=(200, 200), layers=6, rotation_center=(100.0, 100.0)),
)
SOURCE = "the authors' links: https://github.com/IDEA-Research/3D-deformable-attention"
WEIGHTS = dict(
    dfa3d_bev_s=f"bevformer_small_DFA3D by {SOURCE}",
    dfa3d_bev_b=f"bevformer_base_DFA3D by {SOURCE}",
)
default_cfgs = generate_default_cfgs(
    {"dfa3d_bev_s.untrained": _cfg(736, 1280), "dfa3d_bev_b.untrained": _cfg(928, 1600)}
)


def _create(name: str, pretrained: bool, **kwargs) -> BEVLifter:
    if kwargs.get("num_classes"):
        raise ValueError(f"{name} has no classifier: num_classes must be 0, got {kwargs['num_classes']}")
    middle = dict(rotation_center=None) if "bev_size" in kwargs else {}  # of another view than the published one
    kwargs = VARIANTS[name] | middle | dict(kwargs_filter=("num_classes", "global_pool")) | kwargs
    model = create_model(BEVLifter, name, pretrained, checkpoint_filter_fn, WEIGHTS[name], **kwargs)
    if not isinstance(model.backbone, ResNetDCN):  # images are prepared as its backbone wants them
        wanted = {key: model.backbone.pretrained_cfg[key] for key in ("mean", "std")}
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | wanted
    return model


@register_model
def dfa3d_bev_s(pretrained: bool = False, **kwargs) -> BEVLifter:
    return _create("dfa3d_bev_s", pretrained, **kwargs)


@register_model
def dfa3d_bev_b(pretrained: bool = False, **kwargs) -> BEVLifter:
    return _create("dfa3d_bev_b", pretrained, **kwargs)
