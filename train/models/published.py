"""Loads whole detectors, segmenters and lifters from their authors' files, which OpenMMLab's tools wrote.

Such a file is a torch pickle with `state_dict` and `meta`. The heads here have the parameter names of those files, and
the backbones' names are mapped by their `checkpoint_filter_fn`, so that loading is a comparison of names and shapes.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from timm.data import resolve_data_config
from torch import Tensor, nn

from ..runtime import config as configs
from ..runtime.errors import UserError
from .build import create_features
from .weights import Weights, read_weights

HEADS = ("neck.", "bbox_head.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")


# Tensors of heads whose shape depends on the number of classes; the last two are the lifter's heads'.
SIZED_BY_CLASS = re.compile(r"\.(fc_cls|fc_reg|conv_logits|retina_cls|conv_seg)\.|^head\.(kinds\.\d+\.6|peaks\.2)\.")
# The order of nuScenes' classes in published lifters, for files that don't name them.
NUSCENES = ("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian")
NUSCENES += ("traffic_cone",)


def read_published(file: str | Path | Weights) -> Weights:
    """Read a file as `read_weights` does; a published lifter that names no classes gets nuScenes'."""
    weights = read_weights(file)
    if not weights.class_names and is_lifter(weights.tensors) and count_classes(weights.tensors) == len(NUSCENES):
        weights = replace(weights, class_names=list(NUSCENES))
    return weights


def is_dense(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors are a whole detector's or segmenter's, by OpenMMLab's names, which ours also have."""
    return any(key.startswith("backbone.") for key in tensors) and any(key.startswith(HEADS) for key in tensors)


def is_lifter(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors are a whole published bird's-eye-view detector of BEVFormer's kind."""
    return any(key.startswith("img_backbone.") for key in tensors) and "pts_bbox_head.bev_embedding.weight" in tensors


def read_tensors(file: str | Path | Weights) -> dict[str, Tensor]:
    """Read the tensors of any weight file or run folder; from a run's checkpoint, the best weights."""
    return read_published(file).tensors


def load_backbone(
    name: str,
    levels: Any,
    tensors: dict[str, Tensor],
    file: str | Path,
    first_norm: bool = True,
    norms: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a backbone by `create_features` and load every tensor of a whole model that is below `backbone.` into it.

    first_norm: whether the norm of the finest map must be there. norms: see create_features.
    """
    # `body.` is there in models that OpenMMLab's tools trained on a SaccadeBackbone.
    own = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    own = {key.removeprefix("body."): value for key, value in own.items()}
    body = create_features(name, levels, norms=norms, **kwargs)
    state = body.state_dict()
    counts = {key: value for key, value in state.items() if key.endswith("num_batches_tracked")}
    if state.keys() == (counts | own).keys() and all(state[key].shape == value.shape for key, value in own.items()):
        body.load_state_dict(counts | own)
        return body
    if any("out_norms." in key for key in state):
        check_map_norms(tensors, 4, not first_norm, file)
    try:
        return create_features(name, levels, own, norms=norms, **kwargs)
    except UserError as error:
        raise UserError(f"checkpoint {file} is of {describe(tensors)}, and {error}") from error


def describe(tensors: dict[str, Tensor]) -> str:
    """Describe the kind of model that tensors belong to, judged by their names: "a segmenter with UPerNet"."""
    has = lambda pattern: any(re.match(pattern, key) for key in tensors)  # noqa: E731
    kind = "a backbone or a classifier"
    if has(r"decode_head\."):
        kind = "a segmenter with UPerNet" if has(r"decode_head\.psp_modules") else "a segmenter"
        kind = "a segmenter with Semantic FPN" if has(r"decode_head\.scale_heads") else kind
    elif has(r"bbox_head\.retina_cls"):
        kind = "a RetinaNet"
    elif has(r"roi_head\.bbox_head\.0\."):
        kind = f"a Cascade {'Mask ' if has(r'roi_head.mask_head') else ''}R-CNN"
    elif has(r"roi_head\.bbox_head\."):
        kind = f"a {'Mask' if has(r'roi_head.mask_head') else 'Faster'} R-CNN"
    elif has(r"bbox_head\.(fc_cls|0\.fc_cls)"):
        kind = "an R-CNN of mmdet 1, whose heads have other names and label order"
    elif has(r"pts_bbox_head\.bev_embedding\.|lifter\."):
        kind = "a detector in a bird's-eye view"
    elif has(r"(pts_bbox_head|bbox_head|neck|rpn_head)\."):
        kind = "a detector of another kind"
    return kind


def load_heads(model: nn.Module, tensors: dict[str, Tensor], file: str | Path, new_head: bool = False) -> list[str]:
    """Load everything but the backbone from a whole model's tensors; return the keys that were left out.

    new_head: weights whose shape depends on the number of classes may differ and are then not loaded. Raises
    UserError, with the file's kind of model and the differences, if anything else does not fit.
    """
    ours = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    theirs = {key: value for key, value in tensors.items() if not key.startswith("backbone.")}
    optional = lambda key: key.endswith("num_batches_tracked")  # noqa: E731
    missing = [key for key in ours if key not in theirs and not optional(key)]
    unexpected = [key for key in theirs if key not in ours and not optional(key)]
    resized = [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    by_class = [key for key in resized if SIZED_BY_CLASS.search(key)]
    if missing or unexpected or len(resized) > len(by_class) or (resized and not new_head):
        faults = [f"it lacks {key}" for key in missing[:2]] + [f"it has {key}" for key in unexpected[:2]]
        for key in resized[:2]:
            faults.append(f"{key} is {tuple(theirs[key].shape)} there and {tuple(ours[key].shape)} here")
        count = len(missing) + len(unexpected) + len(resized)
        more = f" and {count - len(faults)} more" if count > len(faults) else ""
        hint = "give the model and task sections that it was trained with"
        if not missing and not unexpected and len(resized) == len(by_class):
            hint = "the number of classes differs"
        elif "mmdet 1" in describe(tensors):
            hint = "convert it with upgrade_model_version.py of mmdet 2's tools/model_converters"
        raise UserError(
            f"checkpoint {file} is of {describe(tensors)} and does not fit: {'; '.join(faults)}{more}; {hint}"
        )
    kept = {key: value for key, value in theirs.items() if key in ours and key not in resized}
    model.load_state_dict(kept, strict=False)
    return resized


def check_map_norms(tensors: dict[str, Tensor], count: int, optional_first: bool, file: str | Path) -> None:
    """Raise UserError if a file lacks norms for some of the backbone's `count` maps, which would stay untrained."""
    norms = {m[1] for key in tensors if (m := re.match(r"backbone\.(extra_norms\.\d+|norm\d)\.weight", key))}
    if len(norms) < count - optional_first:
        raise UserError(
            f"checkpoint {file} lacks norms of its backbone's maps (it has {', '.join(sorted(norms)) or 'none'}): "
            "give model.out_norms=False if it was trained without, or a complete file"
        )


def load_published(
    config: str,
    file: str | Path,
    *,
    num_classes: int | None = None,
    task: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a published detector, segmenter or lifter with its authors' weights, in evaluation mode.

    config: a recipe's name below configs/, such as "coco/mask_rcnn_biformer_s_1x", or a config file's path.
    file: the authors' .pth, `meta` with `state_dict` as OpenMMLab writes it, or a bare state dict; averaged weights
    are preferred. num_classes: of the head (None: as many as the file names, or its head has).
    task, model: settings that replace those of the config's sections of these names; a segmenter's task may have
    `scale` too, instead of data.scale.

    Parameters are made in torch's default dtype. The model has `class_names`, from the file or "class 0", …. Raises
    UserError, in one sentence, if the file is another model's or can't be read.
    """
    path = Path(config)
    if path.suffix != ".py":
        path = Path(__file__).parents[2] / "configs" / f"{config}.py"
    settings = configs.load(path)
    published = read_published(file)
    wants_lifter = settings["task"]["type"].of_lifters
    if not (is_lifter if wants_lifter else is_dense)(published.tensors):
        wanted = "a whole detector in a bird's-eye view" if wants_lifter else "a whole detector or segmenter"
        raise UserError(
            f"checkpoint {file} is of {describe(published.tensors)}, not of {wanted}: give it with the config that it "
            "was trained with or, for its backbone, to `saccade train` with checkpoint=FILE"
        )
    names = published.class_names
    if num_classes is not None and (names is None or len(names) != num_classes):
        names = None
    elif names is not None:
        num_classes = len(names)
    else:
        num_classes = count_classes(published.tensors)
    if names is None:
        names = [f"class {i}" for i in range(num_classes)]
    section = settings["task"] | (task or {})
    data = SimpleNamespace(
        class_names=names,
        scale=section.pop("scale", settings["data"].get("scale")),
        inputs=lambda pretrained_cfg: resolve_data_config(pretrained_cfg=pretrained_cfg),
    )
    built = configs.build(section, data).model(**settings["model"] | (model or {}), checkpoint=published)
    built.class_names = names
    return built.eval()


def count_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes of a file's head."""
    for key, background in (("fc_cls.weight", 1), ("conv_seg.weight", 0)):
        for weight in (tensor for name, tensor in tensors.items() if name.endswith(key)):
            return len(weight) - background
    if "bbox_head.retina_cls.weight" in tensors:
        return len(tensors["bbox_head.retina_cls.weight"]) // (len(tensors["bbox_head.retina_reg.weight"]) // 4)
    if "pts_bbox_head.cls_branches.0.6.weight" in tensors:
        return len(tensors["pts_bbox_head.cls_branches.0.6.weight"])
    raise UserError("num_classes must be given: the file has no head to infer it from")
