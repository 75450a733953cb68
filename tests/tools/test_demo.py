"""What `make demo` and docs/start.md promise, by the very commands they give."""

import json
import re
from pathlib import Path

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.datasets import load_digits
from support.jobs import Job
from support.levels import exhaustive

ROOT = Path(__file__).parents[2]
FILES = ["model.safetensors", "config.json", "config.py", "environment.json", "log.txt", "log.jsonl"]


def tool(script: str, *arguments: str) -> str:
    job = Job(ROOT / script, *[str(ROOT / word) if word.startswith("configs/") else word for word in arguments])
    assert job.wait(800) == 0, job.text()
    return job.text()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("overrides", "top1"), [(["epochs=1"], 20.0), exhaustive([], 98.0)])
def test_demo(tmp_path, overrides, top1):
    run = tmp_path / "demo"
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    lines = [line.split()[1:] for line in recipe.splitlines() if "tools/" in line]
    assert [line[0] for line in lines] == ["tools/train.py", "tools/test.py"]
    lines[0] += overrides
    for script, *arguments in lines:
        said = tool(script, *[word.replace("runs/demo", str(run)) for word in arguments])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["top5"] >= metrics["top1"] >= top1 and metrics["images"] == 360 and metrics["seconds"] > 0
    for file in FILES:
        assert (run / file).stat().st_size > 0
    for picture in ("curves", "confusion", "attended"):
        assert plt.imread(run / "pictures" / f"{picture}.png").std() > 0.05
    loading = re.search(r'timm\.create_model\("(.*?)", pretrained=True\)', said)
    model = timm.create_model(loading[1], pretrained=True).eval()
    digit = torch.from_numpy(load_digits().images[:1] / 16).float()[:, None]
    x = torch.nn.functional.interpolate(digit, model.pretrained_cfg["input_size"][1:], mode="bicubic").expand(
        -1, 3, -1, -1
    )
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert model((x - mean) / std).argmax().item() == load_digits().target[0]


def test_own_folder(command, tmp_path):
    """docs/start.md, section 3: a folder of pictures, from fine-tuning to predictions."""
    digits, pictures, run = load_digits(), tmp_path / "pictures", tmp_path / "run"
    for i in range(240):
        folder = pictures / f"digit_{digits.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((32, 32)).save(folder / f"{i}.png")
    small = ["data.img_size=32", "model.n_win=2", "model.topks=(1,2,4,-2)", "epochs=1", "batch_size=16"]

    def tool(name: str, *arguments: object) -> str:
        code, out, err = command(name, *arguments)
        assert code == 0, err
        return out

    tool("train", ROOT / "configs/finetune/folder.py", f"data.root={pictures}", *small, "--run-dir", run)
    tool("test", run)
    assert 40 <= json.loads((run / "metrics.json").read_text())["images"] <= 56  # a fifth of each class
    out = tmp_path / "out.json"
    said = tool("predict", run, pictures / "digit_3", "--top", "2", "--json", out)
    found = json.loads(out.read_text())
    files = sorted((pictures / "digit_3").iterdir())
    assert [row["image"] for row in found] == [str(f) for f in files]
    *lines, summary = said.splitlines()  # a line per image, then a count
    assert len(lines) == len(files) and summary.startswith(f"{len(files)} images: ")
    for row in found:
        assert [c["name"].startswith("digit_") for c in row["classes"]] == [True, True]
        assert 1 >= row["classes"][0]["probability"] >= row["classes"][1]["probability"] >= 0


def test_predict_says_what_is_missing(command, tmp_path):
    code, _, err = command("predict", tmp_path, tmp_path / "none.png")
    assert code == 2 and "does not exist" in err
