"""Three ways to explain a model: its attention itself, attention rollout, and Grad-CAM."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from saccade.backbones import attention_maps
from saccade.backbones.attention_maps import AttentionMap, QueryMap, SamplingMap
from saccade.train.runtime.errors import UserError
from saccade.train.visual.attention import query_frame
from torch import Tensor, nn

from .subject import Subject

METHODS = ("attention", "rollout", "gradcam")
FIELD_OF_VIEW = 70  # degrees across, of the camera that a lifter's image is assumed to be of


@dataclass
class Explained:
    """One map. name: layer and kind. values (h, w), not negative. frame: of the query, see `draw_map`. query: (row,
    column) of the query's grid, None without a query. head: None for the mean. facts: further ones, for --json."""

    name: str
    values: np.ndarray
    frame: tuple[float, float, float, float] | None = None
    query: tuple[int, int] | None = None
    head: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    points: np.ndarray | None = None  # (n, 3) of x and y, as shares of the image, and weight

    # As of AttentionMap, for saccade.train.visual.attention.choose_layers.
    @property
    def layer(self) -> str:
        return self.name.rpartition(":")[0]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def has_query(self) -> bool:
        return self.frame is not None or self.points is not None


def explain(
    subject: Subject,
    image: Image.Image,
    layer: str | None = None,
    head: int | None = None,
    query: tuple[float, float] | None = None,
    method: str = "attention",
    target: int | None = None,
) -> list[Explained]:
    """Explain what a model does with an image, layer by layer.

    layer: a layer, or layer:kind; None or "all": all of them (Grad-CAM: the last map). head: None for the mean over
    heads. query: (x, y) in pixels of the image; None: the class token or else the middle. target: the class that
    Grad-CAM explains; None: the predicted one. Of a lifter, the query is (x, y) in metres, to the right and ahead.

    Raises UserError for a layer, head or query that does not exist, and for a method that the model does not allow.
    """
    if method not in METHODS:
        raise UserError(f"--method must be one of {', '.join(METHODS)}, got {method}")
    width, height = image.size
    if query and not subject.is_lifter and not (0 <= query[0] < width and 0 <= query[1] < height):
        raise UserError(f"--query {query[0]:g},{query[1]:g} is outside the image of {width} x {height} pixels")
    if method == "gradcam":
        return _gradcam(subject, image, layer, target)
    records = record(subject, image)
    if method == "rollout":
        return _rollout(subject, records, image, layer, query)
    chosen = select(subject, records, layer)
    for one in chosen:
        heads = max(other.heads for other in records if layer_of(other) == layer_of(one))
        if head is not None and not 0 <= head < heads:
            raise UserError(f"head must be from 0 to {heads - 1} in {one.name}, got {head}")
    try:
        return [of_record(subject, one, image, head, query) for one in chosen]
    except ValueError as error:
        raise UserError(str(error)) from error


def record(subject: Subject, image: Image.Image) -> list[AttentionMap]:
    """Return the attention maps of an image. Raises UserError for a model without any."""
    x = subject.prepare(image)
    inputs = (x[None], front_camera(*x.shape[2:]).to(x.device)) if subject.is_lifter else (x,)
    with torch.inference_mode(False):
        records = attention_maps(subject.body, *inputs)
    if not records:
        raise UserError(f"{subject.name} has no attention that saccade describes: try --method gradcam")
    return records


def front_camera(height: int, width: int) -> Tensor:
    """Return lidar2img (1, 1, 4, 4) of one camera that looks ahead: x to the right, y ahead, z up."""
    focal = width / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2))
    rows = [[focal, width / 2, 0, 0], [0, height / 2, -focal, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def select(subject: Subject, records: Sequence[AttentionMap], layer: str | None) -> list[AttentionMap]:
    """Return the maps of a layer, given as LAYER or LAYER:KIND; all for None and "all"."""
    if layer in (None, "all"):
        return list(records)
    names = [layer, f"{layer}.attn", f"{layer}.mix.0", f"{layer}.mixer"]
    chosen = [one for one in records if one.name == layer or one.layer in names]
    if not chosen:
        raise _no_layer(subject, layer, [one.name for one in records])
    return chosen


def layer_of(one: AttentionMap) -> str:
    return one.name.rpartition(":")[0]


def _no_layer(subject: Subject, layer: str, names: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(layer, names, n=1, cutoff=0.6)
    hint = f", did you mean {near[0]}" if near else ""
    return UserError(f"--layer {layer} is not in {subject.name}{hint}: there is {', '.join(names)}")


def place_query(
    subject: Subject, one: AttentionMap, image: Image.Image, query: tuple[float, float] | None
) -> tuple[int, int] | None:
    """Return the cell of a record's query grid for a query in the image."""
    if not one.has_query:
        return None
    if subject.is_lifter:
        low, high = subject.body.pc_range[:2], subject.body.pc_range[3:5]
        x, y = query or (0.0, min(15.0, 0.5 * high[1]))
        if not (low[0] <= x < high[0] and low[1] <= y < high[1]):
            raise UserError(
                f"--query {x:g},{y:g} is outside the view, x from {low[0]:g} to {high[0]:g} and y from {low[1]:g} to "
                f"{high[1]:g} metres"
            )
        return one.query_at(y - low[1], x - low[0], (high[1] - low[1], high[0] - low[0]))  # type: ignore[arg-type]
    if query is None:
        if one.query_tokens:
            return None  # the class token
        query = image.width / 2, image.height / 2
    return one.query_at(query[1], query[0], (image.height, image.width))


def of_record(
    subject: Subject, one: AttentionMap, image: Image.Image, head: int | None, query: tuple[float, float] | None
) -> Explained:
    """Return the map of one layer for a head and a query in the image, see `explain`. All heads share a map that has
    one, such as BiFormer's routed regions."""
    of_head = None if one.heads == 1 else head
    cell = place_query(subject, one, image, query)
    facts = dict(kind=one.kind, grid=list(one.grid), heads=one.heads)
    if isinstance(one, SamplingMap):
        values = one.map(cell, of_head).numpy()
        if one.kind != "cameras":
            return Explained(one.name, values, query_frame(one, cell), cell, head, facts)
        samples = one.samples(cell)
        kept = torch.ones_like(samples["head"], dtype=torch.bool) if head is None else samples["head"] == head
        points = torch.stack([samples[key][kept].float() for key in ("x", "y", "weight")], 1).numpy()
        return Explained(one.name, values, None, cell, head, facts, points)
    return Explained(one.name, one.map(cell, of_head).numpy(), query_frame(one, cell), cell, head, facts)


def _rollout(
    subject: Subject,
    records: Sequence[AttentionMap],
    image: Image.Image,
    layer: str | None,
    query: tuple[float, float] | None,
) -> list[Explained]:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): products of (mean over heads + identity) / 2.

    It is a product over layers with the same tokens: from the first layer of a resolution to the one that is asked.
    Attention to padding is left out, and the rest sums to 1.
    """
    able = [one for one in records if isinstance(one, QueryMap) and one.is_token_to_token]
    if not able:
        raise UserError(f"--method rollout needs attention between tokens, which {subject.name} has in no layer")
    chosen = select(subject, able, layer)
    explained = []
    steps: list[Tensor] = []
    previous: AttentionMap | None = None
    for one in able:
        if previous is not None and (one.grid, one.tokens) != (previous.grid, previous.tokens):  # type: ignore[attr-defined]
            steps = []
        previous = one
        steps.append(_step(one))
        if one not in chosen:
            continue
        cell = place_query(subject, one, image, query)
        row = torch.zeros(one.num_queries, device=steps[0].device)
        row[one._index(cell)] = 1.0
        for step in reversed(steps):
            row = (row + row @ step) / 2
        values = row[one.tokens :].unflatten(0, one.grid).cpu().numpy()
        facts = dict(kind="rollout", grid=list(one.grid), layers=len(steps))
        explained.append(Explained(f"{one.layer}:rollout", values, query_frame(one, cell), cell, None, facts))
    return explained


@torch.no_grad()
def _step(one: QueryMap) -> Tensor:
    """Return the mean over heads of a layer's weights between its own tokens, (N, N), whose rows sum to 1."""
    pieces = []
    for index in torch.arange(one.num_queries).split(512):
        weights = one.weights(index)[0].mean(0).float()
        weights = torch.cat((weights[:, : one.tokens], one.on_grid(weights).flatten(1)), 1)
        pieces.append(weights / weights.sum(1, keepdim=True).clamp_min(1e-12))
    return torch.cat(pieces)


def _gradcam(subject: Subject, image: Image.Image, layer: str | None, target: int | None) -> list[Explained]:
    """Grad-CAM (arXiv 1610.02391) by captum, on the maps that the model's feature_info lists."""
    if find_spec("captum") is None:
        raise UserError("--method gradcam needs captum: pip install 'saccade[explain]'")
    if not subject.is_classifier:
        raise UserError(f"--method gradcam needs a classifier, whose score it explains; {subject.name} is none")
    from captum.attr import LayerGradCam

    infos = [info for info in getattr(subject.body, "feature_info", []) if info.get("module")]
    names = [info["module"] for info in infos]
    if not infos:
        raise UserError(f"{subject.name} lists no maps in its feature_info, which --method gradcam needs")
    if layer not in (None, "all") and layer not in names:
        raise _no_layer(subject, layer, names)
    chosen = infos[-1:] if layer is None else [info for info in infos if layer in ("all", info["module"])]
    x = subject.prepare(image)
    with torch.no_grad():
        logits = subject.body(x)
    if target is None:
        target = int(logits[0].argmax())
    elif not 0 <= target < logits.shape[1]:
        raise UserError(f"--target must be a class from 0 to {logits.shape[1] - 1}, got {target}")
    explained = []
    for info in chosen:
        probe = nn.Identity()
        hook = subject.body.get_submodule(info["module"]).register_forward_hook(_through(probe, info, x.shape[2:]))
        try:
            cam = LayerGradCam(subject.body, probe).attribute(x, target=target, relu_attributions=True)
        finally:
            hook.remove()
        values = cam[0, 0].detach().float().cpu().numpy()
        facts = dict(kind="gradcam", grid=list(values.shape), target=target)
        explained.append(Explained(f"{info['module']}:gradcam", values, facts=facts))
    return explained


def _through(probe: nn.Module, info: dict[str, Any], size: Sequence[int]) -> Callable:
    """Return a hook that passes a layer's output through `probe` as a map (B, C, h, w), whatever its own layout."""

    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(output, tuple) and output[1] is not None:
            raise UserError(f"--method gradcam can't map {info['module']}, which has removed tokens")
        if x.dim() == 4:
            nhwc = x.shape[1] != info["num_chs"]
            y = probe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if nhwc else probe(x)
        else:
            h, w = (-(-side // info["reduction"]) for side in size)
            first = x.shape[1] - h * w
            y = probe(x[:, first:].transpose(1, 2).unflatten(2, (h, w))).flatten(2).transpose(1, 2)
            y = torch.cat((x[:, :first], y), 1)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook
