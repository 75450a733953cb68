"""Build models by name, from timm's registry."""

import inspect
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import is_model, parse_model_name, resolve_model_input_args, save_for_hf, split_model_name_tag
from torch import Tensor, nn

from ... import backbones  # noqa: F401  (registers ours)
from ..runtime.checkpoint import as_os_error, atomic_write, write_text
from ..runtime.errors import UserError, closest, first_line, from_os, options
from .weights import Weights, read_weights


def create(
    name: str,
    num_classes: int,
    img_size: int | None = None,
    checkpoint: str | Path | Weights | None = None,
    new_head: bool = False,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm model for `num_classes` classes; `img_size` reaches models that are built for one size.

    checkpoint: a file of weights that timm can load (published, timm's, or of a run here), or a run folder. With
    `new_head`, a classifier of another size than ours is left out. pretrained: the weights that timm publishes.
    Raises UserError for an invalid name, argument or file, naming valid ones.
    """
    check_name(name)
    folder = name.removeprefix("local-dir:") if name.startswith("local-dir:") else None
    try:
        arguments = resolve_model_input_args(name, dict(img_size=img_size), num_classes=num_classes, **kwargs)
        if checkpoint is None:
            with _published_weights(name, pretrained):
                return timm.create_model(**arguments, pretrained=pretrained)
        with torch.device("meta"):  # errors in the arguments are raised before the file is opened
            heads = timm.create_model(**arguments).pretrained_cfg.get("classifier") or ()
    except Exception as error:
        if folder is not None:  # its files are data: whatever is wrong with them is no fault of the program
            raise UserError(f"the model in {folder} can't be read ({_first_lines(error)})") from error
        if isinstance(error, TypeError):
            raise _unknown_argument(name, error) from error
        if not isinstance(error, (ValueError, AssertionError, RuntimeError, OSError)):
            raise
        raise UserError(f"{name} can't be built with {_call(img_size, kwargs)}: {first_line(error)}") from error
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    weights = read_weights(checkpoint)
    load = partial(_create_with, weights.file, arguments, heads if new_head else ())
    model = _load_with_or_without_prefix(weights.tensors, load)
    model.pretrained_cfg.pop("state_dict", None)  # it would be copied with the model
    return model


@contextmanager
def _published_weights(name: str, pretrained: bool) -> Iterator[None]:
    """Download the weights that timm publishes for a model in the block, or raise UserError at once without a network.

    Files in the cache are used without a network too.
    """
    if not pretrained or name.startswith("local-dir:"):
        yield
        return
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or not _can_reach(huggingface_hub.constants.ENDPOINT)
    try:
        with patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", offline):
            yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, URLError, ConnectionError) as error:
        hub = timm.get_pretrained_cfg(name) if is_model(split_model_name_tag(name)[0]) else None
        source = (hub and (hub.hf_hub_id or hub.url)) or name
        reason = "no network connection" if offline else first_line(error)
        raise UserError(
            f"the published weights of {name} ({source}) can't be downloaded ({reason}): connect to the network, or "
            f"download their file elsewhere and give it with {options().checkpoint}"
        ) from error


def _can_reach(endpoint: str) -> bool:
    """Tell whether a web server answers within seconds; behind a proxy, assume so."""
    if getproxies():
        return True
    address = urlsplit(endpoint)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def check_name(name: str) -> None:
    """Raise UserError for a model's name that timm does not know."""
    try:
        source, known = parse_model_name(name)
    except ValueError as error:
        raise UserError(f"model.name={name}: {error}") from error
    if source is None and not is_model(split_model_name_tag(known)[0]):
        raise UserError(f"unknown model {name}{closest(split_model_name_tag(known)[0], timm.list_models())}")


def create_features(
    name: str,
    out_indices: Sequence[int] | Callable[[list[int]], Sequence[int]] | None = None,
    checkpoint: str | Path | Weights | dict[str, Tensor] | None = None,
    pretrained: bool = False,
    norms: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model that returns its stages' maps: images (B, 3, H, W) to a list of (B, C, H / s, W / s).

    out_indices: the maps to return, or a function of all strides that chooses them (None: the model's default); the
    model's `feature_info` has their channels C and strides s.
    checkpoint: a classifier's weights, or those of a published detector's or segmenter's backbone, as in `create`. The
    classifier in them is left out; norms of the maps that a file lacks start anew. Or the tensors of such a backbone.
    pretrained: the weights that timm publishes.
    norms: a model of ours that can have `out_norms` has them unless told otherwise, but Agent-PVT, published without.
    For optimisers it has `layers`, what the whole model's group_matcher() says, and `exempt`, its no_weight_decay();
    `arguments` are those of timm.create_model that it was made with.
    Raises UserError as `create` does, and where the model has no such maps.
    """
    check_name(name)
    wanted: dict[str, Any] = {}
    try:
        with torch.device("meta"):  # errors in the arguments are raised before a file is opened
            whole = timm.create_model(name, **kwargs)
        if norms and "out_norms" in inspect.signature(type(whole)).parameters and not name.startswith("agent_pvt"):
            kwargs = dict(out_norms=True) | kwargs
        if callable(out_indices):
            rows = getattr(whole.feature_info, "info", whole.feature_info)
            out_indices = out_indices([row["reduction"] for row in rows])
        if out_indices is not None:
            wanted = dict(out_indices=tuple(out_indices))
        given = kwargs | dict(features_only=True)
        build = partial(timm.create_model, name, **given, **wanted)
        if checkpoint is None:
            with _published_weights(name, pretrained):
                model = build(pretrained=pretrained)
        else:
            model = _features_from(
                checkpoint if isinstance(checkpoint, dict) else read_weights(checkpoint), build, kwargs
            )
    except TypeError as error:
        raise _unknown_argument(name, error) from error
    except (ValueError, AssertionError, RuntimeError, OSError, IndexError) as error:
        said = _call(None, kwargs | wanted)
        raise UserError(f"{name} can't be built for its maps with {said}: {first_line(error)}") from error
    model.pretrained_cfg.pop("state_dict", None)  # it would be copied with the model
    model.arguments = dict(name=name, **kwargs, **wanted)
    matcher = getattr(whole, "group_matcher", lambda coarse: {})
    model.layers, model.stages = matcher(coarse=False), matcher(coarse=True)
    model.exempt = set(whole.no_weight_decay()) if hasattr(whole, "no_weight_decay") else set()
    return model


def _features_from(
    weights: Weights | dict[str, Tensor], build: Callable[..., nn.Module], kwargs: dict[str, Any]
) -> nn.Module:
    """`build`'s model with the weights of a file, or with these tensors, loaded through timm's own pretrained path.

    timm loads features without saying what did not fit, so the whole model is loaded first. Tensors are those of a
    published dense model's backbone: all of them must have their place.
    """
    file, tensors = (None, weights) if isinstance(weights, dict) else (weights.file, weights.tensors)
    return _load_with_or_without_prefix(tensors, partial(_features_with, file, build, kwargs))


def _features_with(
    file: Path | None, build: Callable[..., nn.Module], kwargs: dict[str, Any], tensors: dict[str, Tensor]
) -> nn.Module:
    """Load tensors through timm's own pretrained path; `file` is for messages, None for a dense model's backbone."""
    strict, name = file is None, build.args[0]
    model = build()
    kept = {re.match(r"[a-zA-Z]+", key.removeprefix("model."))[0] for key in model.state_dict()}  # stages_0. or stages.
    try:
        timm.create_model(name, **kwargs, pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(tensors)))
    except Exception as error:  # a foreign file fails wherever a model's own key mapping meets the unexpected
        problems = _disagreements(error)
        ours = [
            text
            for key, text in problems
            if re.match(r"[a-zA-Z]+", key)[0] in kept or (strict and not text.startswith("it lacks"))
        ]
        if ours or not problems:
            message = "; ".join(ours[:3]) or first_line(error)
            what = "its backbone" if strict else f"checkpoint {file}"
            raise UserError(
                f"{what} does not fit {name} ({message}): "
                "give the model.name and model arguments that it was trained with"
            ) from error
    return build(pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(tensors), num_classes=-1))


# What other programs put before a model's names: Lightning, DistributedDataParallel, torch.compile, OpenMMLab, ….
PREFIXES = ("model.", "module.", "_orig_mod.", "backbone.", "net.", "network.", "encoder.")


def _load_with_or_without_prefix(
    tensors: dict[str, Tensor], load: Callable[[dict[str, Tensor]], nn.Module]
) -> nn.Module:
    """Call `load` with the weights as they are named or, where they don't fit, without another program's prefix: a
    usual one or, where that does not fit either, any that all names have."""
    try:
        return load(tensors)
    except UserError as error:
        first = error
    stripped = strip_prefixes(tensors)
    if stripped.keys() != tensors.keys():
        try:
            return load(stripped)
        except UserError as error:
            first = error
    pairs = zip(min(stripped).split("."), max(stripped).split("."))
    prefix = "".join(f"{part}." for part, other in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if prefix:
        try:
            return load({key.removeprefix(prefix): value for key, value in stripped.items()})
        except UserError:
            pass
    raise first


def strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that other programs put before a model's names, and the tensors beside the model.

    A prefix is removed where more than half of the names have it; the others (a loss's, a neck's) are not the model's.
    """
    while True:
        for prefix in PREFIXES:
            inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if 2 * len(inside) > len(tensors):
                tensors = inside
                break
        else:
            return tensors


def _create_with(
    file: Path, arguments: dict[str, Any], heads: tuple[str, ...], tensors: dict[str, Tensor]
) -> nn.Module:
    """Create a model with these tensors, through timm's own pretrained path; `heads` need not fit.

    file: for messages.
    """
    name, classes = arguments["model_name"], arguments["num_classes"]
    try:  # with the file's classifier, every tensor must find its place
        return timm.create_model(
            **arguments,
            pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=dict(tensors), num_classes=classes),
        )
    except Exception as error:  # a foreign file fails wherever a model's own key mapping meets the unexpected
        problems = _disagreements(error)
        if not (problems and all(key.rpartition(".")[0] in heads for key, _ in problems)):
            said = "; ".join(text for _, text in problems[:3]) or first_line(error)
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {file} does not fit {name} ({said}{more}): "
                "give the model.name and model arguments that it was trained with"
            ) from error
    # Of another number than ours: timm leaves the file's classifier out.
    overlay = dict(state_dict=dict(tensors), num_classes=-1)
    return timm.create_model(**arguments, pretrained=True, pretrained_cfg_overlay=overlay)


def _disagreements(error: Exception) -> list[tuple[str, str]]:
    """(key, what is wrong with it) for each complaint of load_state_dict's message, the kinds taking turns."""
    text = str(error)
    kinds = []
    for label, said in (("Missing key", "it lacks"), ("Unexpected key", "it has")):
        block = re.search(rf'{label}\(s\) in state_dict: (("[^"]+"(, )?)+)', text)
        kinds.append([(key, f"{said} {key}") for key in re.findall(r'"([^"]+)"', block[1])] if block else [])
    shapes = r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)"
    kinds.append([(key, f"{key} is ({theirs}), not ({ours})") for key, theirs, ours in re.findall(shapes, text)])
    return [problem for turn in zip_longest(*kinds) for problem in turn if problem]


def _unknown_argument(name: str, error: TypeError) -> UserError:
    """Return the error for an argument that a model does not take."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return UserError(f"{name} can't be built: {error}")
    with torch.device("meta"):
        model = timm.create_model(name)
    names = [*inspect.signature(type(model)).parameters, "pretrained"]
    return UserError(f"{name} has no argument model.{unknown[1]}{closest(unknown[1], names)}")


def _call(img_size: int | None, kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in {"img_size": img_size, **kwargs}.items() if v is not None) or "defaults"


def _first_lines(error: BaseException) -> str:
    """Return the type of an error and two lines of its message, as one: torch's say what does not fit on the second."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return f"{type(error).__name__}: {' '.join(lines)}".rstrip(".: ")


@torch.no_grad()
def probe(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Run the model on a black image (channels, height, width). Raises UserError with its message if it fails."""
    training = model.training
    first = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, *input_size, device=first.device))
    except (ValueError, AssertionError, RuntimeError) as error:
        channels, height, width = input_size
        raise UserError(
            f"the model can't take images of {height}x{width} with {channels} channels: {first_line(error)}; "
            "change data.img_size or the model's arguments"
        ) from error
    model.train(training)


def export(model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
    """Write model.safetensors and config.json, which timm.create_model("local-dir:FOLDER", pretrained=True) reads.

    inputs: preprocessing as timm names it (input_size, interpolation, mean, std, crop_pct). Raises UserError where they
    can't be written.
    """
    model = model.cpu().to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model.", suffix=".tmp") as scratch:
        try:
            save_for_hf(
                model, scratch, dict(label_names=class_names), safe_serialization=True, data_config=dict(inputs)
            )
        except (OSError, SafetensorError) as error:
            raise from_os(as_os_error(error), f"saving {folder / 'model.safetensors'}") from error
        file = Path(scratch, "config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)  # transformers passes it beside model_args
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name in ("model.safetensors", "config.json"):
            with atomic_write(folder / name) as temporary:
                os.replace(Path(scratch, name), temporary)


def save_whole(model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str], **entries: Any) -> None:
    """Write model.safetensors, all weights under the model's own names, and config.json: preprocessing and classes.

    For models that timm does not build. entries: further ones of config.json. Raises UserError where they can't be
    written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise from_os(as_os_error(error), f"saving {folder / 'model.safetensors'}") from error
    content = dict(label_names=class_names, data_config=inputs, **entries)
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
