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
from itertools import zip_longest
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
from timm.models import (
    is_model,
    load_state_dict,
    parse_model_name,
    resolve_model_input_args,
    save_for_hf,
    split_model_name_tag,
)
from torch import nn

from ... import backbones  # noqa: F401  (registers ours)
from ..runtime.checkpoint import Foreign, as_os_error, atomic_write, read, write_text
from ..runtime.errors import UserError, closest, from_os


def create(
    name: str,
    num_classes: int,
    img_size: int | None = None,
    checkpoint: str | Path | None = None,
    new_head: bool = False,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm model for `num_classes` classes; `img_size` reaches models that are built for one size.

    checkpoint: a file of weights that timm can load (published, timm's, or of a run here), or a run folder. With
    `new_head`, a classifier of another size than ours is left out. pretrained: the weights that timm publishes.
    Raises UserError for an invalid name, argument or file, naming valid ones.
    """
    _known(name)
    try:
        arguments = resolve_model_input_args(name, dict(img_size=img_size), num_classes=num_classes, **kwargs)
        if checkpoint is None:
            with _published_weights(name, pretrained):
                return timm.create_model(**arguments, pretrained=pretrained)
        with torch.device("meta"):  # errors in the arguments are raised before the file is opened
            heads = timm.create_model(**arguments).pretrained_cfg.get("classifier") or ()
    except TypeError as error:
        raise _unknown_argument(name, error) from error
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"{name} can't be built with {_call(img_size, kwargs)}: {_first_line(error)}") from error
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    model = _create_from(Path(checkpoint), arguments, heads if new_head else ())
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
        reason = "no network connection" if offline else _first_line(error)
        raise UserError(
            f"the published weights of {name} ({source}) can't be downloaded ({reason}): connect to the network, or "
            "download their file elsewhere and give it with checkpoint=FILE"
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


def _known(name: str) -> None:
    """Raise UserError for a name that timm does not know."""
    try:
        source, known = parse_model_name(name)
    except ValueError as error:
        raise UserError(f"model.name={name}: {error}") from error
    if source is None and not is_model(split_model_name_tag(known)[0]):
        raise UserError(f"unknown model {name}{closest(split_model_name_tag(known)[0], timm.list_models())}")


def create_features(
    name: str,
    out_indices: Sequence[int] | Callable[[list[int]], Sequence[int]] | None = None,
    checkpoint: str | Path | dict[str, torch.Tensor] | None = None,
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
    For optimisers it has `layers`, what the whole model's group_matcher() says, and `exempt`, its no_weight_decay().
    Raises UserError as `create` does, and where the model has no such maps.
    """
    _known(name)
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
            model = _features_from(checkpoint if isinstance(checkpoint, dict) else Path(checkpoint), build, kwargs)
    except TypeError as error:
        raise _unknown_argument(name, error) from error
    except (ValueError, AssertionError, RuntimeError, OSError, IndexError) as error:
        said = _call(None, kwargs | wanted)
        raise UserError(f"{name} can't be built for its maps with {said}: {_first_line(error)}") from error
    model.pretrained_cfg.pop("state_dict", None)  # it would be copied with the model
    matcher = getattr(whole, "group_matcher", lambda coarse: {})
    model.layers, model.stages = matcher(coarse=False), matcher(coarse=True)
    model.exempt = set(whole.no_weight_decay()) if hasattr(whole, "no_weight_decay") else set()
    return model


def _features_from(
    file: Path | dict[str, torch.Tensor], build: Callable[..., nn.Module], kwargs: dict[str, Any]
) -> nn.Module:
    """`build`'s model with the weights of a file, or with these tensors, loaded through timm's own pretrained path.

    timm loads features without saying what did not fit, so the whole model is loaded first. Tensors are those of a
    published dense model's backbone: all of them must have their place.
    """
    overlay = dict(state_dict=file) if isinstance(file, dict) else _weights(file)
    return _load_with_or_without_prefix(overlay, partial(_features_with, file, build, kwargs))


def _features_with(
    file: Path | dict[str, torch.Tensor],
    build: Callable[..., nn.Module],
    kwargs: dict[str, Any],
    overlay: dict[str, Any],
) -> nn.Module:
    """Load the weights that `overlay`, entries of the model's pretrained_cfg, gives; `file` is for messages."""
    strict, name = isinstance(file, dict), build.args[0]
    model = build()
    kept = {re.match(r"[a-zA-Z]+", key.removeprefix("model."))[0] for key in model.state_dict()}  # stages_0. or stages.
    try:
        timm.create_model(name, **kwargs, pretrained=True, pretrained_cfg_overlay=dict(overlay))
    except Exception as error:  # a foreign file fails wherever a model's own key mapping meets the unexpected
        problems = _disagreements(error)
        ours = [
            text
            for key, text in problems
            if re.match(r"[a-zA-Z]+", key)[0] in kept or (strict and not text.startswith("it lacks"))
        ]
        if ours or not problems:
            message = "; ".join(ours[:3]) or _first_line(error)
            what = "its backbone" if strict else f"checkpoint {file}"
            raise UserError(
                f"{what} does not fit {name} ({message}): "
                "give the model.name and model arguments that it was trained with"
            ) from error
    return build(pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=-1))


# What other programs put before a model's names: Lightning, DistributedDataParallel, torch.compile, OpenMMLab, ….
PREFIXES = ("model.", "module.", "_orig_mod.", "backbone.", "net.", "network.", "encoder.")


def _load_with_or_without_prefix(overlay: dict[str, Any], load: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Call `load` with the weights as they are named or, where they don't fit, without another program's prefix."""
    try:
        return load(overlay)
    except UserError:
        tensors = overlay["state_dict"] if "state_dict" in overlay else load_state_dict(overlay["file"])
        stripped = strip_prefixes(tensors)
        if stripped.keys() == tensors.keys():
            raise
    return load({key: value for key, value in overlay.items() if key != "file"} | dict(state_dict=stripped))


def strip_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def _create_from(file: Path, arguments: dict[str, Any], heads: tuple[str, ...]) -> nn.Module:
    """Create a model through timm's own pretrained path, with the weights of a file; `heads` need not fit."""
    return _load_with_or_without_prefix(_weights(file), partial(_create_with, file, arguments, heads))


def _create_with(file: Path, arguments: dict[str, Any], heads: tuple[str, ...], overlay: dict[str, Any]) -> nn.Module:
    """Create a model with the weights that `overlay`, entries of its pretrained_cfg, gives; `file` is for messages."""
    name, classes = arguments["model_name"], arguments["num_classes"]
    try:  # with the file's classifier, every tensor must find its place
        return timm.create_model(
            **arguments, pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=classes)
        )
    except Exception as error:  # a foreign file fails wherever a model's own key mapping meets the unexpected
        problems = _disagreements(error)
        if not (problems and all(key.rpartition(".")[0] in heads for key, _ in problems)):
            said = "; ".join(text for _, text in problems[:3]) or _first_line(error)
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {file} does not fit {name} ({said}{more}): "
                "give the model.name and model arguments that it was trained with"
            ) from error
    overlay["num_classes"] = -1  # of another number than ours: timm leaves the file's classifier out
    return timm.create_model(**arguments, pretrained=True, pretrained_cfg_overlay=overlay)


def _weights(file: Path) -> dict[str, Any]:
    """The pretrained_cfg entries that make timm load a file; of a training checkpoint, its best weights' tensors."""
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(f"there is no checkpoint {file}: give a file of weights or the folder of a finished run")
    try:
        if file.suffix == ".safetensors":
            tensors, meta = read(file)
            kind = meta["best"]["weights"] + "." if meta["best"] else "model."
            return dict(state_dict={k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)})
        load_state_dict(str(file))
    except Foreign:
        pass
    except Exception as error:  # zip, pickle and tensor readers each have their own
        raise UserError(f"checkpoint {file} {why_unreadable(file, error)}") from error
    return dict(file=str(file))


def why_unreadable(file: Path, error: Exception) -> str:
    """Describe why a file can't be read as weights, from its first bytes and the reader's error."""
    with open(file, "rb") as content:
        start = content.read(256).lstrip().lower()
    if not start:
        return "is empty: download it again"
    if start.startswith(b"<"):
        return "is a web page (HTML), not weights: download the file itself, not the page about it"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights: fetch the file itself with git lfs pull"
    if start.startswith((b"{", b"[")):
        return "is JSON text, not weights: give the file of weights"
    if start.isascii() and re.fullmatch(rb"[\s\x20-\x7e]*", start):
        return "is text, not weights: give the file of weights"
    blocked = re.search(r"(?:GLOBAL |globals: |global )(\w+\.[\w.]+)", str(error))
    if "weights_only" in str(error) and blocked:
        return (
            f"holds Python objects ({blocked[1]}), which are not loaded as they can run code: where you trust it, save "
            "its state_dict alone to another file"
        )
    if "weights_only" in str(error):
        return "is not a file of weights, or is damaged: download or convert it again"
    return f"can't be read ({_first_line(error)}): it is damaged or incomplete; download or convert it again"


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights or a run's folder, under their own names; of a checkpoint, its best weights."""
    weights = _weights(Path(file))
    return weights["state_dict"] if "state_dict" in weights else load_state_dict(weights["file"])


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


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
            f"the model can't take images of {height}x{width} with {channels} channels: {_first_line(error)}; "
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
