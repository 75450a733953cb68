"""Write a finished run as a folder for the Hugging Face Hub, with a model card whose example has run, and upload it."""

import contextlib
import io
import json
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import safe_open

from .models.build import export
from .predict import predictor
from .runtime import config
from .runtime.checkpoint import BEST, label_names, write_text
from .runtime.errors import UserError, first_line, from_os
from .runtime.run_folder import check_finished
from .tasks.classify import Classify
from .tasks.detect import Detect
from .tasks.segment import Segment

PIPELINES = {Classify: "image-classification", Detect: "object-detection", Segment: "image-segmentation"}
PHOTO = "photo.jpg"  # the picture in the card's example

CLASSIFIER = """\
import saccade.backbones, timm, torch
from PIL import Image

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.no_grad():
    probabilities = model(transform(Image.open("{photo}").convert("RGB"))[None]).softmax(-1)[0]
for i in probabilities.topk(min(3, len(probabilities))).indices.tolist():
    print(f"{{model.pretrained_cfg['label_names'][i]}} {{100 * probabilities[i]:.1f}} %")
"""
DENSE = """\
from pathlib import Path

from huggingface_hub import snapshot_download
from PIL import Image
from saccade.train.predict import predictor

model = predictor(Path(snapshot_download("{repo}")), "cpu")
(record,) = model.predict([Image.open("{photo}")])
print(model.describe(record))
"""


def publish(
    run: Path, repo: str, license: str, to: Path | None = None, private: bool = False
) -> tuple[str, list[Path]]:
    """Write the folder of a Hub repository from a finished run, and upload it unless `to` says where to leave it.

    run: of a classifier, which timm.create_model("hf-hub:REPO", pretrained=True) then loads (timm's save_for_hf writes
    it), or of a detector or segmenter, whose folder saccade.train.predict.predictor reads. repo: user/name. license: of
    the weights, by its identifier on the Hub, such as apache-2.0. to: a folder, which must not exist or be empty.
    private: of the repository.

    The card has the metrics of the run's last test or, without one, of its best checkpoint; the config without folders
    of this machine; the data; the licence; and an example. The example is run on the written folder, and its result
    compared with the run's, before anything is kept or uploaded. Returns (where it is, the folder's files).

    Raises UserError for a folder without a finished run, a task that is not published, and what the Hub refuses.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"the repository must be user/name, got {repo}: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"the repository must be user/name, got {repo}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        raise UserError(f"--license must be an identifier of the Hub, such as apache-2.0 or cc-by-4.0, got {license}")
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to} is not an empty folder: give a new one")
    check_finished(run)
    settings = config.load(run / "config.py")
    task = settings["task"]["type"]
    kind = next((kind for kind in PIPELINES if issubclass(task, kind)), None)
    if kind is None:
        raise UserError(f"{run} is of {task.__name__}, which is not published: only classifiers, detectors, segmenters")
    parent = to.parent if to is not None else None
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".publish.", dir=parent) as scratch:
            folder = Path(scratch, "folder")
            folder.mkdir()
            example = _write(run, folder, kind, settings)
            card = _card(run, repo, license, kind, settings, example.format(repo=repo, photo=PHOTO))
            write_text(folder / "README.md", card)
            _run_example(run, folder, kind, example)
            names = sorted(path.name for path in folder.iterdir())
            if to is not None:
                os.replace(folder, to)
                return str(to), [to / name for name in names]
            return _upload(folder, repo, private), [Path(name) for name in names]
    except OSError as error:
        raise from_os(error, f"writing {to or 'the folder'}") from error


def _write(run: Path, folder: Path, kind: type, settings: dict[str, Any]) -> str:
    """Write weights and configs into the folder; return the template of the example."""
    (folder / "config.py").write_text(_without_paths((run / "config.py").read_text(encoding="utf-8")), encoding="utf-8")
    if kind is not Classify:
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_bytes((run / name).read_bytes())
        return DENSE
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    export(model, folder, model.pretrained_cfg, label_names(run))
    (folder / "config.py").rename(folder / "training_config.py")  # the folder is timm's, not a run's
    return CLASSIFIER


def _without_paths(text: str) -> str:
    """Replace absolute paths in the text of a config by their last part: they name folders of this machine."""
    return re.sub(r"""(['"])(?:/|~/|[A-Za-z]:[\\/])[^'"\n]*?([^'"/\\\n]*)[/\\]?\1""", r"\1\2\1", text)


def read_metrics(run: Path) -> tuple[str, dict[str, float]]:
    """Return what a run's metrics are of, and the numbers: of its last test or, without one, its best checkpoint."""
    if (run / "metrics.json").is_file():
        content = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        numbers = {key: value for key, value in content.items() if isinstance(value, (int, float))}
        return f"{content.get('split', 'test')}", _only_results(numbers)
    best = run / "checkpoints" / BEST
    if not best.is_file():
        raise UserError(f"{run} has no metrics.json: test it first (`saccade test {run}`)")
    with safe_open(best, "pt") as file:
        metrics = json.loads(file.metadata()["saccade"])["best"]["metrics"]
    return "val, which chose the checkpoint", _only_results({k: v for k, v in metrics.items() if v is not None})


def _only_results(numbers: dict[str, Any]) -> dict[str, float]:
    other = {"seconds", "images_per_s", "model_images_per_s", "crop_pct", "step", "epoch", "best"}
    return {key: value for key, value in numbers.items() if key not in other and not isinstance(value, bool)}


def _card(run: Path, repo: str, license: str, kind: type, settings: dict[str, Any], example: str) -> str:
    data, name = settings["data"]["type"], settings["model"]["name"]
    split, metrics = read_metrics(run)
    root = settings["data"].get("root")
    dataset = data.__name__ + (f" ({Path(str(root)).name})" if root else "")
    results = [
        EvalResult(PIPELINES[kind], data.__name__.lower(), dataset, key, round(value, 4), dataset_split=split)
        for key, value in metrics.items()
        if key != "images"
    ]
    meta = ModelCardData(
        license=license,
        library_name="timm" if kind is Classify else "saccade",
        pipeline_tag=PIPELINES[kind],
        tags=["saccade", "timm", PIPELINES[kind]],
        model_name=repo.partition("/")[2],
        eval_results=results,
    )
    classes = label_names(run)
    pretrained = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    facts = [f"- **Model:** `{name}`" + (f", {pretrained.paper_name}" if pretrained and pretrained.paper_name else "")]
    if pretrained is not None and pretrained.origin_url:
        stated = pretrained.license or "not stated"
        facts.append(f"- **Published code:** <{pretrained.origin_url}>, licence {stated}")
    if settings.get("checkpoint"):
        facts.append(f"- **Trained from:** `{Path(str(settings['checkpoint'])).name}`")
    about = (data.__doc__ or "").strip().partition("\n")[0]
    facts.append(f"- **Data:** {dataset}. {about}")
    shown = ", ".join(map(str, classes[:20])) + (" …" if len(classes) > 20 else "")
    facts.append(f"- **Classes:** {len(classes)}: {shown}")
    facts.append(f"- **Licence of the weights:** {license}")
    facts.append(f"- **Written by:** saccade {version('saccade')}, timm {version('timm')}, torch {torch.__version__}")
    rows = [f"| {key} | {value:.6g} |" for key, value in metrics.items()]
    install = "pip install saccade" if kind is Classify else "pip install 'saccade[train,coco]'"
    text = _without_paths((run / "config.py").read_text(encoding="utf-8")).strip()
    parts = [f"---\n{meta.to_yaml()}\n---\n", f"# {repo.partition('/')[2]}\n", *(line for line in facts), ""]
    parts += [f"## Metrics\n\nOn {split}; accuracies in percent.\n", "| metric | value |", "|---|---:|", *rows, ""]
    parts += [f"## Use\n\n```\n{install}\n```\n", f"```python\n{example}```\n"]
    parts += [f"## Training\n\n```python\n{text}\n```"]
    return "\n".join(parts) + "\n"


def _run_example(run: Path, folder: Path, kind: type, example: str) -> None:
    """Run the card's example on the folder and a made picture. Raises UserError where it is not the run's result."""
    with tempfile.TemporaryDirectory() as scratch:
        photo = Path(scratch, PHOTO)
        values = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(values).resize((256, 192)).save(photo)
        code = example.replace("hf-hub:{repo}", f"local-dir:{folder}").replace(
            'snapshot_download("{repo}")', "{repo!r}"
        )
        code = code.format(repo=str(folder), photo=photo)
        names: dict[str, Any] = {}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "README.md", "exec"), names)
        except Exception as error:
            raise UserError(f"the card's example does not run ({type(error).__name__}: {error})") from error
        with torch.no_grad():
            expected = predictor(run, "cpu")
            if kind is Classify:
                x = expected.transform(Image.open(photo).convert("RGB"))[None]  # type: ignore[attr-defined]
                same = torch.equal(names["probabilities"], expected.model(x).softmax(-1)[0])  # type: ignore[attr-defined]
            else:
                same = names["record"] == expected.predict([Image.open(photo)])[0]
    if not same or not printed.getvalue().strip():
        raise UserError(f"the card's example gives another result than {run}, so nothing is published")


def _upload(folder: Path, repo: str, private: bool) -> str:
    api = HfApi(library_name="saccade", library_version=version("saccade"))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model"))
    except LocalTokenNotFoundError as error:
        raise UserError("the Hub needs a token: log in with `hf auth login`, or write a folder with --to") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # httpx's errors are neither
        raise _refused(repo, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):  # httpx2, too
            raise
        raise _refused(repo, error) from error


def _refused(repo: str, error: Exception) -> UserError:
    return UserError(f"{repo} can't be uploaded ({first_line(error)}): write a folder with --to, and upload it later")
