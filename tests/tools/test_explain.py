"""`saccade explain`: the maps it writes are the model's, and bad input is one sentence with nothing written."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from saccade.explain import explain, load
from saccade.explain import subject as subjects
from saccade.train.runtime.errors import UserError
from support.families import build

SPARSE = "sparsifiner_deit_t"


@pytest.fixture
def picture(tmp_path):
    generator = np.random.default_rng(0)
    file = tmp_path / "picture.png"
    Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((120, 80)).save(file)
    return file


def subject(name: str) -> subjects.Subject:
    made = subjects._of_model(name, build(name).eval(), "untrained")
    made.size_for = lambda height, width: (64, 64)
    return made


@pytest.fixture
def small(monkeypatch):
    """Models by name are small ones of the family."""
    monkeypatch.setattr("saccade.explain.files.load", lambda spec, *_: subject(spec))


def test_writes_what_the_model_does(command, picture, tmp_path, small):
    out = tmp_path / "out"
    arguments = ["biformer_t", picture, "--query", "70,50", "--head", "0", "--out", out, "--gif", "--json"]
    code, text, err = command("explain", *arguments)
    assert (code, err) == (0, "")
    facts = json.loads(text)
    one = subject("biformer_t")
    x = one.prepare(Image.open(picture))
    records = {r.name: r for r in one.body.attention_maps(x)}
    assert [row["name"] for row in facts["maps"]] == list(records)
    with np.load(out / "maps.npz") as arrays:
        assert int(arrays["head"]) == 0
        for name, record in records.items():
            cell = record.query_at(50, 70, (80, 120))
            assert tuple(arrays[f"{name}/query"]) == cell
            np.testing.assert_allclose(arrays[name], record.map(cell, 0).numpy(), rtol=1e-5, atol=1e-7)
    assert sorted(path.name for path in out.iterdir()) == sorted(facts["files"])
    with Image.open(out / "layers.gif") as gif:
        assert gif.n_frames > 1
    assert command("explain", *arguments)[0] == 0  # an earlier explanation is replaced
    (out / "mine.txt").write_text("")
    code, _, err = command("explain", *arguments)
    assert code == 2 and "has files of yours (mine.txt)" in err and (out / "maps.npz").exists()


def test_lists_layers(command, small):
    code, text, _ = command("explain", "davit_t", "--list", "--json")
    rows = json.loads(text)
    assert code == 0 and rows[1] == dict(
        name="stages.0.blocks.0.1.attn:channels", kind="channels", grid=[16, 16], heads=1, query=False
    )
    assert "stages.0.blocks.0.0.attn:window" in command("explain", "davit_t", "--list")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["biformer_t", "none.png"], "none.png can't be read as an image (No such file or directory)"),
        (["biformer_t", "TEXT"], "can't be read as an image (unknown format)"),
        (["biformer_tt", "PICTURE"], "there is no run and no model biformer_tt, did you mean biformer_t"),
        (["biformer_t", "PICTURE", "--layer", "stages.9"], "--layer stages.9 is not in biformer_t"),
        (["biformer_t", "PICTURE", "--query", "120,3"], "--query 120,3 is outside the picture of 120 x 80 pixels"),
        (["biformer_t", "PICTURE", "--query=-1,3"], "--query -1,3 is outside the picture"),
        (["biformer_t", "PICTURE", "--head", "99"], "head must be from 0 to 0 in stages.0.blocks.0.attn:regions, got"),
        (["biformer_t", "PICTURE", "--method", "lime"], "--method must be one of attention, rollout, gradcam"),
        (["biformer_t"], "give a picture after the model"),
        (["biformer_t", "PICTURE", "--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["ela_resnet18", "PICTURE", "--method", "rollout"], "--method rollout needs attention between tokens"),
        (["test_resnet", "PICTURE"], "test_resnet has no attention that saccade describes"),
    ],
)
def test_bad_input(command, picture, tmp_path, monkeypatch, arguments, sentence):
    def fast(spec, checkpoint=None, *rest):
        known = spec in ("biformer_t", "ela_resnet18") and checkpoint is None
        return subject(spec) if known else load(spec, checkpoint, *rest)

    monkeypatch.setattr("saccade.explain.files.load", fast)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    names = dict(PICTURE=picture, TEXT=text)
    line = [names.get(argument, argument) for argument in arguments]
    code, out, err = command("explain", *line, "--out", tmp_path / "out")
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "text.png"]


def test_names_the_layers_there_are(picture):
    with pytest.raises(UserError, match=r"did you mean stages.0.*: there is stages.0.blocks.0.0.attn:window, "):
        explain(subject("davit_t"), Image.open(picture), "stages.0.blocks.0.0.attn:windows")


def test_rollout_is_the_product_of_layers(picture):
    torch.manual_seed(0)
    model = timm.create_model(SPARSE, img_size=64, depth=3, dim=48, heads=3, reduce_n=2, coef_topk=4).eval()
    one = subjects._of_model(SPARSE, model, "untrained")
    one.size_for = lambda height, width: (64, 64)
    image = Image.open(picture)
    found = explain(one, image, "blocks.2", method="rollout")
    product = torch.eye(17)
    for record in model.attention_maps(one.prepare(image)):
        if record.kind == "tokens":
            product = (torch.eye(17) + record.weights(torch.arange(17))[0].mean(0)) / 2 @ product
    assert [item.name for item in found] == ["blocks.2.attn:rollout"]
    np.testing.assert_allclose(found[0].values.flatten(), product[0, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["biformer_t", "agent_deit_t", "halo_h0"])
def test_gradcam(picture, name):
    pytest.importorskip("captum", reason="captum is not installed: pip install 'saccade[explain]'")
    one = subject(name)
    (found,) = explain(one, Image.open(picture), method="gradcam", target=2)
    assert found.values.shape == ((4, 4) if name == "agent_deit_t" else (2, 2)) and (found.values >= 0).all()
    if name == "biformer_t":  # by hand: the maps weighted by the mean gradient
        maps = {}
        handle = one.body.stages[3].register_forward_hook(lambda m, i, o: maps.setdefault("x", o).retain_grad())
        one.body(one.prepare(Image.open(picture)))[0, 2].backward()
        handle.remove()
        expected = (maps["x"] * maps["x"].grad.mean((2, 3), keepdim=True)).sum(1).relu()[0]
        np.testing.assert_allclose(found.values, expected.detach().numpy(), rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="--target must be a class from 0 to 4, got 9"):
        explain(one, Image.open(picture), method="gradcam", target=9)


def test_a_run_and_its_prediction(command, classifier_digits, tmp_path):
    run, picture = classifier_digits
    code, text, err = command("explain", run, picture, "--method", "gradcam", "--out", tmp_path / "out")
    assert (code, err) == (0, "") and "predicted: " in text and f"weights of the run {run}" in text


@pytest.fixture
def classifier_digits(tmp_path, picture):
    """A folder as a run leaves it, of a classifier with ten classes."""
    from saccade.train.models.build import export

    folder = tmp_path / "run"
    folder.mkdir()
    model = timm.create_model("test_resnet", num_classes=10)
    inputs = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    export(model, folder, inputs, [str(i) for i in range(10)])
    return folder, picture
