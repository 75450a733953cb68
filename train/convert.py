"""Write models as files that other programs read, and read the files of others as ours."""

import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbones.published import MismatchError, compare_shapes
from .data.files import first
from .models.build import check_name, create_features, strip_prefixes
from .models.openmmlab import to_openmmlab
from .models.weights import read_weights
from .predict import predictor
from .runtime import config
from .runtime.checkpoint import atomic_write, checksum, write_text
from .runtime.errors import UserError, first_line
from .runtime.run_folder import check_finished
from .tasks.classify import Classify
from .tasks.detect import Detect
from .tasks.segment import Segment

Layout = dict[str, tuple[Sequence[int], str]]  # of a published file: key -> (shape, dtype)
MOST_LISTED = 50  # keys in a message


def convert(run: Path, out: Path) -> list[Path]:
    """Write the model of a run's folder as OpenMMLab's checkpoint `out` (.pth), and its config beside it (.py).

    A detector's or segmenter's is the whole model; a classifier's is its backbone. Returns the two files. Raises
    UserError for a folder without a model, a task that has no such model there, and files that exist.
    """
    files = [out, out.with_suffix(".py")]
    _check_output(out, ".pth", files)
    check_finished(run)
    settings = config.load(run / "config.py")
    task, names = settings["task"]["type"], []
    if issubclass(task, (Detect, Segment)):
        loaded = predictor(run, "cpu")
        model, names = loaded.model, loaded.class_names
    elif issubclass(task, Classify):
        arguments = {key: value for key, value in settings["model"].items() if key != "pretrained"}
        model = create_features(**arguments, checkpoint=run)
    else:
        raise UserError(f"{run} is of {task.__name__}, which OpenMMLab's libraries have no model for")
    content = to_openmmlab(model, names)
    with atomic_write(out) as temporary:
        torch.save(content, temporary)
    write_text(files[1], content["meta"]["cfg"])
    return files


class Converted(NamedTuple):
    """file: what was written. load: a line of Python that loads it. provenance: as in the file's metadata, or {}.
    unused: keys of the published file that are not in it."""

    file: Path
    load: str
    provenance: dict[str, Any]
    unused: list[str]


def from_published(source: Path, model: str, out: Path, **kwargs: Any) -> Converted:
    """Write the authors' file of a model as a safetensors file with our names, and where it comes from.

    source: a file that read_weights reads: weights only, no code in it runs. model, kwargs: of timm.create_model, as
    the file's. `out` (.safetensors) is loaded by timm.create_model(model, pretrained=True,
    pretrained_cfg_overlay=dict(file=out)), which is tried, and compared bit for bit, before the file is kept. The
    metadata's "provenance" is JSON: source, sha256, size, date, converter, model, arguments, license, origin, paper,
    and `layout` and `container`, from which `to_published` writes the authors' keys again.

    Raises UserError with the keys that do not fit, for weights that the file lacks, and for files that exist.
    """
    _check_output(out, ".safetensors", [out])
    net = _build(model, kwargs)
    weights = read_weights(source)
    try:
        state, tensors = _fit(net, model, weights.tensors, source), weights.tensors
    except UserError:
        tensors = strip_prefixes(weights.tensors)
        if tensors.keys() == weights.tensors.keys():
            raise
        state = _fit(net, model, tensors, source)
    layout: Layout = {key: (list(value.shape), str(value.dtype)) for key, value in tensors.items()}
    traced = _trace(model, kwargs, layout)
    absent = [key for key in state if not key.endswith("num_batches_tracked") and (traced.get(key, ZERO) < 0).all()]
    if traced and absent:
        raise UserError(
            f"{source} has no values of {_listed(absent)}, which would stay random: if it is a detector's or "
            "segmenter's backbone, give the file itself to `saccade train` with checkpoint=FILE"
        )
    net.load_state_dict(state)
    cfg = net.pretrained_cfg
    provenance = dict(
        source=source.name,
        sha256=checksum(source),
        size=source.stat().st_size,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        converter=f"saccade {version('saccade')}",
        model=model,
        arguments=kwargs,
        license=f"of the published weights or code: {cfg.get('license') or 'none is stated'}; see {cfg['origin_url']}",
        origin=cfg["origin_url"],
        paper=cfg.get("paper_ids"),
        container=weights.container,
        layout=layout,
    )
    own = {key: value.contiguous() for key, value in net.state_dict().items()}
    with _kept_if_valid(out) as temporary:
        save_file(own, temporary, {"format": "pt", "provenance": json.dumps(provenance)})
        overlay = dict(file=str(temporary), num_classes=net.num_classes)
        again = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).state_dict()
        if unequal := [key for key in own if not torch.equal(own[key], again[key])]:
            raise UserError(f"timm reads {_listed(unequal)} of {out} with other values, so it is not kept")
    return Converted(out, _line(model, out, kwargs), provenance, _unused(traced, layout))


def to_published(source: Path, out: Path, like: Path | None = None, model: str | None = None) -> Converted:
    """Write our weights under the authors' names as `out` (.pth), a PyTorch file of tensors alone.

    source: a file that `from_published` wrote or, with `like`, one of the authors' files of the same model, any file of
    our weights or a classifier's run. model: its name, where neither the file nor the run has it. The family's mapping
    from published keys is followed backwards, element by element, and the result is read again: it must give the very
    weights. Buffers that the mapping ignores (tables of indices, masks) are left out.

    Raises UserError for a file without a record of the authors' keys, and a mapping that cannot be inverted.
    """
    _check_output(out, ".pth", [out])
    provenance, arguments = _provenance(source), {}
    if provenance:
        model, arguments = model or provenance["model"], provenance["arguments"]
    elif (source / "config.json").is_file():
        content = json.loads((source / "config.json").read_text(encoding="utf-8"))
        model, arguments = model or content.get("architecture"), content.get("model_args", {})
        arguments |= dict(num_classes=content["num_classes"]) if "num_classes" in content else {}
    if model is None:
        raise UserError(f"{source} does not say which model it is of: give --model NAME")
    if like is not None:
        theirs = read_weights(like)
        layout: Layout = {key: (list(value.shape), str(value.dtype)) for key, value in theirs.tensors.items()}
        container = theirs.container
    elif provenance:
        layout, container = provenance["layout"], provenance["container"]
    else:
        raise UserError(f"{source} has no record of the authors' keys: give one of their files of {model} with --like")
    net = _build(model, arguments)
    own = _fit(net, model, read_weights(source).tensors, source)
    traced = _trace(model, arguments, layout)
    if not traced or any((ids != ids.round()).any() for ids in traced.values()):
        raise UserError(f"the weights of {model} are not a reordering of the published ones, so they can't be undone")
    flat = torch.zeros(sum(math.prod(shape) for shape, _ in layout.values()), dtype=torch.float64)
    for key, ids in traced.items():
        taken = ids.flatten() >= 0
        flat[ids.flatten()[taken].long()] = own[key].double().flatten()[taken]
    unused, tensors, first = set(_unused(traced, layout)), {}, 0
    for key, (shape, dtype) in layout.items():
        count = math.prod(shape)
        if key not in unused:
            values = flat[first : first + count].reshape(shape)
            tensors[key] = values.to(getattr(torch, dtype.removeprefix("torch.")))
        first += count
    again = _fit(net, model, tensors, source)
    wrong = [key for key in own if not torch.equal(own[key], again[key].to(own[key].dtype))]
    if wrong := [key for key in wrong if (traced.get(key, ZERO) >= 0).any()]:
        raise UserError(f"{_listed(wrong)} of {source} can't be written under the published names: other values return")
    with atomic_write(out) as temporary:
        torch.save({container: tensors} if container else tensors, temporary)
    return Converted(out, _line(model, out, arguments), {}, sorted(unused))


ZERO = torch.zeros(())


def _check_output(out: Path, suffix: str, files: Sequence[Path]) -> None:
    if out.suffix != suffix:
        raise UserError(f"the output must be a file that ends in {suffix}, got {out}: give {out.with_suffix(suffix)}")
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists: give another name, or remove it first")


@contextmanager
def _kept_if_valid(out: Path) -> Iterator[Path]:
    """Yield a path to write to, with the suffix of `out`, which it becomes unless the block raises."""
    with atomic_write(out) as temporary, tempfile.TemporaryDirectory(prefix=".convert.", dir=out.parent) as folder:
        file = Path(folder, out.name)
        yield file
        os.replace(file, temporary)


def _build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a model of saccade. Raises UserError for a name and arguments that are none of ours."""
    check_name(name)
    if not hasattr(_module(name), "checkpoint_filter_fn"):
        raise UserError(f"{name} is no model of saccade, whose published keys it maps: see `saccade zoo`")
    try:
        return timm.create_model(name, **kwargs).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name} can't be built with {kwargs}: {first_line(error)}") from error


def _module(name: str) -> Any:
    return sys.modules[timm.model_entrypoint(name).__module__]


def _fit(net: nn.Module, name: str, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return weights under our names and in our dtypes, or raise UserError with the keys that do not fit."""
    own = net.state_dict()
    try:
        counts = {
            key: value for key, value in own.items() if key.endswith("num_batches_tracked")
        }  # old files lack them
        state = counts | _module(name).checkpoint_filter_fn(dict(tensors), net)
        differences = compare_shapes(state, own, [k for k in own if k not in state or state[k].shape != own[k].shape])
        differences += [f"{key} is not there" for key in state if key not in own]
    except MismatchError as error:
        differences = error.differences
    except Exception as error:  # the mapping of a foreign file fails wherever it meets the unexpected
        raise UserError(f"{file} does not fit {name}: {first_line(error)}") from error
    if differences:
        raise UserError(
            f"{file} does not fit {name}, {len(differences)} entries differ ({_listed(differences, '; ')}): give the "
            "model and arguments, such as num_classes=10, that it was trained with"
        )
    return {key: state[key].to(own[key].dtype) for key in own}


@torch.no_grad()
def _trace(name: str, kwargs: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """Return, for every entry of our state dict, which element of a published file each of its elements comes from.

    Elements are numbered through the file's tensors in order; -1 is an element that the file does not have. The
    family's mapping is applied to the numbers. Returns {} where it compares values, so that numbers can't pass.
    """
    net = timm.create_model(name, **kwargs).double()
    for tensor in net.state_dict().values():
        tensor.fill_(-1)
    numbers, first = {}, 0
    for key, (shape, _) in layout.items():
        count = math.prod(shape)
        numbers[key] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    try:
        return _module(name).checkpoint_filter_fn(numbers, net)
    except (ValueError, RuntimeError):
        return {}


def _unused(traced: dict[str, Tensor], layout: Layout) -> list[str]:
    """Return the keys of a published file no element of which is in our state dict."""
    used = torch.zeros(sum(math.prod(shape) for shape, _ in layout.values()), dtype=torch.bool)
    for ids in traced.values():
        ids = ids.flatten()
        used[ids[ids >= 0].long()] = True
    unused, first = [], 0
    for key, (shape, _) in layout.items():
        if not used[first : first + math.prod(shape)].any():
            unused.append(key)
        first += math.prod(shape)
    return unused


def _provenance(file: Path) -> dict[str, Any]:
    """Return what `from_published` wrote into a file's metadata, or {}."""
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as content:
            return json.loads((content.metadata() or {}).get("provenance", "{}"))
    except (SafetensorError, OSError, ValueError):  # reading the weights reports it
        return {}


def _line(name: str, file: Path, kwargs: dict[str, Any]) -> str:
    """Return the Python that loads a file."""
    classes = f", num_classes={kwargs['num_classes']}" if "num_classes" in kwargs else ""
    own = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    overlay = f'dict(file="{file}"{classes})'
    return f'timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay={overlay}{own})'


def _listed(texts: Sequence[str], separator: str = ", ") -> str:
    return first(texts, MOST_LISTED, separator)
