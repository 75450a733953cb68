"""A published folder loads as its card says, names no folder of this machine, and is not kept where it fails."""

import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from saccade.train import publish

ARGUMENTS = ("ada/digits", "--license", "apache-2.0")


def test_classifier(command, classifier_run, tmp_path):
    folder = tmp_path / "hub" / "digits"
    code, out, err = command("publish", classifier_run, *ARGUMENTS, "--to", folder)
    assert (code, err) == (0, "") and str(folder / "README.md") in out
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training_config.py",
    ]  # fmt: skip
    models = [timm.create_model(f"local-dir:{one}", pretrained=True).eval() for one in (folder, classifier_run)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    top1 = next(result for result in card.data.eval_results if result.metric_type == "top1")
    assert top1.metric_value == round(publish.read_metrics(classifier_run)[1]["top1"], 4) > 50
    assert 'timm.create_model("hf-hub:ada/digits", pretrained=True)' in card.text
    assert "epochs = 4" in card.text and "Digits" in card.text and str(tmp_path) not in card.text
    assert command("publish", classifier_run, *ARGUMENTS, "--to", folder)[::2] == (
        2, f"error: --to {folder} is not an empty folder: give a new one\n"
    )  # fmt: skip


@pytest.mark.parametrize("task", ["detector", "segmenter"])
def test_dense(command, request, tmp_path, task, scenes):
    folder = tmp_path / "folder"
    code, _, err = command("publish", request.getfixturevalue(f"{task}_run"), *ARGUMENTS, "--to", folder)
    assert (code, err) == (0, "")
    files = ("README.md", "config.py")
    assert not [name for name in files if str(scenes.parent) in (folder / name).read_text()]
    assert "predictor(Path(snapshot_download" in (folder / "README.md").read_text()
    code, out, _ = command("predict", folder, next((scenes / "coco/images/test").iterdir()))
    assert code == 0 and out


def test_uploads(command, classifier_run, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo, **kwargs):
            calls.append((repo, kwargs))

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls.append(sorted(file.name for file in folder_path.iterdir()))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(publish, "HfApi", Api)
    code, out, _ = command("publish", classifier_run, *ARGUMENTS, "--private")
    assert code == 0 and "https://hub/ada/digits" in out
    assert calls[0] == ("ada/digits", dict(private=True, exist_ok=True)) and "README.md" in calls[1]

    of_httpx2 = type("ConnectError", (Exception,), {"__module__": "httpx2"})  # of huggingface_hub's newest client
    for error in (OSError("no route to the Hub"), of_httpx2("no route to the Hub")):

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(Api, "create_repo", refuse)
        code, _, err = command("publish", classifier_run, *ARGUMENTS)
        assert code == 2 and "ada/digits can't be uploaded (no route to the Hub): write a folder with --to" in err


def test_refusals(command, classifier_run, tmp_path, monkeypatch):
    to = ("--to", tmp_path / "out")
    for arguments, sentence in [
        ((classifier_run, "digits", *ARGUMENTS[1:]), "the repository must be user/name, got digits"),
        ((classifier_run, "a/b/c", *ARGUMENTS[1:]), "the repository must be user/name, got a/b/c"),
        ((classifier_run, "a/b", "--license", "My own"), "--license must be an identifier of the Hub"),
        ((tmp_path, *ARGUMENTS), "has no config.py and model.safetensors"),
    ]:
        code, _, err = command("publish", *arguments, *to)
        assert code == 2 and sentence in err and err.count("\n") == 1
    assert command("publish", classifier_run, "a/b")[0] == 2  # argparse: --license is required
    monkeypatch.setattr(publish, "CLASSIFIER", publish.CLASSIFIER.replace(".softmax(-1)", ".sigmoid()"))
    code, _, err = command("publish", classifier_run, *ARGUMENTS, *to)
    assert code == 2 and "the card's example gives another result" in err and not to[1].exists()
    monkeypatch.setattr(publish, "CLASSIFIER", "import no_such_module\n")
    assert "does not run (ModuleNotFoundError" in command("publish", classifier_run, *ARGUMENTS, *to)[2]
    assert not list(tmp_path.iterdir())


def test_paths_of_this_machine_are_left_out():
    text = "data = dict(root='/home/ada/pets', lists=['/a/b.txt', 'c/d'])\ncheckpoint = \"~/w/x.pth\"\nlr = 1/2"
    found = publish._without_paths(text)
    assert found == "data = dict(root='pets', lists=['b.txt', 'c/d'])\ncheckpoint = \"x.pth\"\nlr = 1/2"
    assert not re.search("/home|/a/", found)
