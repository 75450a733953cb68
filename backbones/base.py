"""Base classes that implement timm's model interface: heads, stages, intermediate features, pruning.

`Backbone` needs only a head, `Pyramid` a stem and stages of decreasing resolution, `Isotropic` the blocks of a plain
transformer.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, LayerNorm2d, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .attention_maps import HasAttentionMaps
from .layers import as_nchw, as_nhwc


class Backbone(HasAttentionMaps, nn.Module):
    """A model with a `head`, which `reset`s itself and whose `fc` is the classifier.

    A subclass implements `forward_features` and sets `num_classes`, `num_features`, `head_hidden_size` and
    `feature_info`. Modules with a `grad_checkpointing` attribute checkpoint their activations when it is true.
    """

    if TYPE_CHECKING:  # at run time torch.jit.script would read these
        num_classes: int
        num_features: int
        head_hidden_size: int
        feature_info: list[dict[str, Any]]
        head: Any  # of any class that has `reset` and `fc`

        def forward_features(self, x: Tensor) -> Tensor: ...

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # norms and biases are one-dimensional, which timm's optimisers exempt anyway

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        m: Any
        for m in self.modules():
            if hasattr(m, "grad_checkpointing"):
                m.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """Downsampling and blocks: NCHW -> NCHW, channels-last in memory. The blocks take and return (B, H, W, C)."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = as_nhwc(self.downsample(x)).contiguous()
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return as_nchw(x)


def map_norms(dims: tuple[int, ...], eps: float, **dd) -> nn.ModuleList:
    """Return a LayerNorm over the channels of each stage's map: the `out_norms` of a `Pyramid` for dense prediction."""
    return nn.ModuleList(LayerNorm2d(dim, eps=eps, **dd) for dim in dims)


class Pyramid(Backbone):
    """A `stem`, `stages` that each return an NCHW map, a `norm` of the last map, and a `head`.

    `out_norms` is None or has a norm for each stage's map: those are what `forward_intermediates` and `features_only`
    return then, and the next stage gets the map without it.
    """

    if TYPE_CHECKING:
        stem: nn.Module
        stages: Any  # an nn.Sequential
        norm: nn.Module
        out_norms: nn.ModuleList | None

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|head\.norm|out_norms)", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages' maps (timm's interface), normalized by `out_norms` if the model has them.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n stages if an int, these if a list, all if None.
            norm: apply the norm before the head to the last stage's map (only without `out_norms`; without effect
                where the head pools first).
            stop_early: skip the stages after the last one requested.
            output_fmt: "NCHW", nothing else.
            intermediates_only: return only the list of maps, not (final features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages if not stop_early else self.stages[: last_taken + 1]):
            x = stage(x)
            if i in take:
                if self.out_norms is not None:
                    intermediates.append(self.out_norms[i](x))
                else:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == last else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the maps `indices` do not need: later stages, unused norms and, if `prune_head`, the
        head."""
        take, last_taken = feature_take_indices(len(self.stages), indices)
        shortened = last_taken < len(self.stages) - 1
        self.stages = self.stages[: last_taken + 1]
        if self.out_norms is not None:
            kept = [norm if i in take else nn.Identity() for i, norm in enumerate(self.out_norms)]
            self.out_norms = nn.ModuleList(kept[: last_taken + 1])
        if prune_norm or shortened:
            self.norm = nn.Identity()
            if hasattr(self.head, "norm"):
                self.head.norm = nn.Identity()
        if shortened:
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
            self.head = ClassifierHead(self.num_features, 0, pool_type="", **get_device_dtype(self))
        elif prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map after its norm, if any, (B, num_features, H / 32, W / 32)."""
        return self.norm(self.stages(self.stem(x)))


class TokenHead(nn.Module):
    """Map tokens (B, T + N, dim) to logits; the first T are not part of the map, the first is the class token."""

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float, tokens: int = 1, **dd):
        super().__init__()
        self.dim, self.tokens = dim, tokens
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **dd) -> None:
        if pool_type not in (None, "token", "avg", ""):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {pool_type!r}")
        if pool_type is not None:
            self.pool_type = pool_type
        self.fc = nn.Linear(self.dim, num_classes, **dd) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "token":
            x = x[:, 0]
        elif self.pool_type == "avg":
            x = x[:, self.tokens :].mean(1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Isotropic(Backbone):
    """A plain transformer: `embed` maps an image to a class token and tokens; then `blocks`, a `norm` and a `head`.

    A subclass implements `embed`, images -> (tokens (B, 1 + h·w, dim), (h, w)); a block takes both.
    """

    if TYPE_CHECKING:
        blocks: Any  # an nn.Sequential or nn.ModuleList
        norm: nn.Module

        def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]: ...

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem|^cls_token|^pos_embed", blocks=blocks)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Return the blocks' outputs (timm's interface).

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n blocks if an int, these if a list, all if None.
            return_prefix_tokens: return pairs of the output and the class token (B, 1, C).
            norm: apply the final LayerNorm to each.
            stop_early: skip the blocks after the last one requested.
            output_fmt: "NCHW" for maps, "NLC" for tokens; both without the class token.
            intermediates_only: return only the list, not (final tokens, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last_taken = feature_take_indices(len(self.blocks), indices)
        x, size = self.embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks if not stop_early else self.blocks[: last_taken + 1]):
            x = block(x, size)
            if i in take:
                y = self.norm(x) if norm else x
                out = y[:, 1:].unflatten(1, size).permute(0, 3, 1, 2) if output_fmt == "NCHW" else y[:, 1:]
                intermediates.append((out, y[:, :1]) if return_prefix_tokens else out)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the outputs `indices` do not need: later blocks and, if requested, the norm and the
        head."""
        take, last_taken = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last_taken + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> tokens after the final norm, the class token first, (B, 1 + h·w, dim)."""
        x, size = self.embed(x)
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x)


def checked_size(img_size: int | tuple[int, int], stride: int) -> tuple[int, int]:
    """Return img_size as (height, width) after checking that both are multiples of `stride`."""
    size = to_2tuple(img_size)
    if len(size) != 2 or any(n < stride or n % stride for n in size):
        raise ValueError(f"img_size must be a multiple of {stride}, got {img_size}")
    return tuple(size)


def init_linear(model: nn.Module) -> None:
    """Initialize linear layers from a normal of std 0.02, biases with 0; convolutions keep PyTorch's default."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def make_cfg(size: int = 224, stride: int = 32, **kwargs) -> dict[str, Any]:
    """Return timm's pretrained configuration of an ImageNet-1K classifier; kwargs add or replace entries."""
    cells = -(-size // stride)
    return dict(
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=(cells, cells),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier="head.fc",
    ) | dict(kwargs)


def create_model(
    model_cls: type[nn.Module],
    name: str,
    pretrained: bool,
    filter_fn: Callable[[dict, Any], dict],
    weights: str | None,
    out_indices: tuple[int, ...] | int = (0, 1, 2, 3),
    /,
    **kwargs: Any,
) -> Any:
    """Build a registered model through timm, with weights if `pretrained`.

    Args:
        model_cls: the model's class, which takes the other kwargs.
        name: under which it is registered.
        pretrained: whether to load weights.
        filter_fn: the family's `checkpoint_filter_fn`.
        weights: where the authors' file is, for a model whose weights cannot be downloaded; None: there is none.
        out_indices: the maps of `features_only`, unless kwargs say otherwise.
        kwargs: the model's, and those of timm's `build_model_with_cfg`.
    """
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict or cfg.source):
            raise RuntimeError(
                f"{name} has no weights to download ({weights or 'none are published'}): load a file of your own by "
                "pretrained_cfg_overlay=dict(file=PATH), or use pretrained=False"
            )
    feature_cfg = dict(out_indices=out_indices, feature_cls="getter") | kwargs.pop("feature_cfg", {})
    return build_model_with_cfg(
        model_cls, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
    )
