"""The pages' commands are ones that the programs take, and their Python runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from saccade.train import engine
from saccade.train.runtime import config
from support.levels import exhaustive

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/results").glob("*.md"))]
PAGES += sorted((ROOT / "docs/models").glob("*.md"))
# Blocks that need what is not here: a word of theirs, and what that is.
NEEDS = {
    r"\.pth\"": "a file of the authors'",
    r"^data\.augment": "the config around it",
    r"read_base\(\)": "a config file of its own (tests/train/test_config.py)",
    r"inference_detector": "mmdet (tests/train/models/test_openmmlab.py)",
}


def commands() -> list[tuple[str, str]]:
    """(page, line) of each command of ours in the pages' blocks, continued lines joined."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text()):
            if language in ("", "console", "sh", "bash"):
                for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                    if re.match(r"(OMP_NUM_THREADS=\S+ )?(saccade|python tools/|torchrun|find .*python tools/)", line):
                        found.append((page.relative_to(ROOT).as_posix(), line))
    return found


def split(line: str) -> tuple[str, list[str]] | None:
    """Return the command and its arguments; None for a line that is no command of `saccade` or tools/."""
    words = shlex.split(
        line.partition(" | ")[2] if line.startswith("find") else line.partition(" | ")[0], comments=True
    )
    words = words[: words.index(">")] if ">" in words else words
    for i, word in enumerate(words):
        if word == "saccade" or word == "saccade.cli":
            return (words[i + 1].replace("-", "_"), words[i + 2 :]) if i + 1 < len(words) else None
        if re.fullmatch(r"tools/\w+\.py", word):
            return Path(word).stem, words[i + 1 :]
    return None


def test_commands_are_understood(monkeypatch, capsys):
    """Every command of the pages, with its options, configs and keys."""
    completion = importlib.import_module("saccade.cli.completion")
    cli = importlib.import_module("saccade.cli")
    for name in cli.MODULES:
        importlib.import_module(f"saccade.cli.{name}")
    from saccade.cli.configs import list_configs

    parsers = {name: completion.read_parser(name) for name in cli.PROGRAMS + cli.MODULES}
    mistakes, checked, keys = [], 0, {}
    for page, line in commands():
        call = split(line)
        if call is None or call[0] not in parsers or "…" in line or "CONFIG" in line:
            continue
        name, words = call
        checked += 1
        try:
            if {"overrides", "arguments"} & {action.dest for action in parsers[name]._actions}:
                args = parsers[name].parse_intermixed_args(words)
            else:
                args = parsers[name].parse_args(words)
        except SystemExit as end:
            if end.code:
                mistakes.append((page, line, capsys.readouterr().err.strip().splitlines()[-1]))
            continue
        file = str(getattr(args, "config", getattr(args, "run", "")) or "")
        if file in list_configs() or file.startswith("configs/"):
            if file not in list_configs() and not (ROOT / file).is_file():
                mistakes.append((page, line, f"there is no {file}"))
                continue
            if file not in keys:
                path = ROOT / file if file.startswith("configs/") else file
                settings = config.load(path, ["data.root=x"] if "data.root" in line else [])
                keys[file] = {*engine.known_keys(settings), "probe"} if "optimizer" in settings else None
            for override in getattr(args, "overrides", []):
                key = override.partition("=")[0]
                if keys[file] and "$" not in key and not key.startswith(("model.", "probe.")) and key not in keys[file]:
                    mistakes.append((page, line, f"no key {key}"))
    assert not mistakes
    assert checked > 80


@pytest.fixture
def workplace(tmp_path, monkeypatch, classifier_run, detector_run, segmenter_run):
    """A folder with the files that the pages speak of."""
    (tmp_path / "runs/scenes").mkdir(parents=True)
    for name, run in dict(demo=classifier_run, pets=classifier_run, detector=detector_run).items():
        (tmp_path / "runs" / name).symlink_to(run)
    (tmp_path / "runs/scenes/mask_rcnn_biformer_t").symlink_to(detector_run)
    (tmp_path / "runs/scenes/upernet_biformer_t").symlink_to(segmenter_run)
    for name in ("image.jpg", "image.png", "photo.jpg", "photo.png", "some.jpg"):
        Image.new("RGB", (64, 48), (90, 120, 40)).save(tmp_path / name)
    (tmp_path / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    for name in ("backbones", "ops"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pages_with_python():
    """Short pages here; in make test-all, those whose examples take long, too (operators.md: tests/test_docs.py)."""
    quick = ("README.md", "docs/index.md", "docs/segment.md")
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if "```python" in page.read_text() and name != "docs/operators.md":
            yield name if name in quick else exhaustive(name)


@pytest.mark.parametrize("page", pages_with_python())
def test_python_runs(page, workplace, monkeypatch):
    """The blocks of a page in their order, in one namespace; a block is left out where its library is not installed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names: dict = {"__name__": "example"}
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text())
    ran, missing = 0, []
    for block in blocks:
        if any(re.search(pattern, block, re.MULTILINE) for pattern in NEEDS):
            names |= _first_part(block, names)
            continue
        try:
            exec(compile(block, page, "exec"), names)
            ran += 1
        except ModuleNotFoundError as error:
            missing.append(error.name)
    assert ran or missing or page in ("docs/detect.md", "docs/recipes.md", "docs/bev.md")
    if missing and not ran:
        pytest.skip(f"{', '.join(missing)} not installed")


def _first_part(block: str, names: dict) -> dict:
    """Run the lines of a block before the one that needs what is not here."""
    lines = block.splitlines()
    last = next((i for i, line in enumerate(lines) if any(re.search(pattern, line) for pattern in NEEDS)), 0)
    if "import" in block[:200] and last and "mmdet" not in block:
        exec(compile("\n".join(lines[:last]), "page", "exec"), names)
    return names


def test_the_example_for_kubernetes_is_whole():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "tools/pytorchjob.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    for part in ("Master", "Worker"):
        pod = job["spec"]["pytorchReplicaSpecs"][part]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} >= {"shm"}
        words = shlex.split(container["args"][0])
        command = words[words.index("saccade.cli") + 1 :]
        assert command[:2] == ["train", "imagenet/biformer_s"] and "--resume" in command
    config.load("imagenet/biformer_s", ["data.root=/data/imagenet"])
