"""`saccade explain`: the maps it writes are the model's, and bad input is one sentence with nothing written."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from saccade.explain import explain, load
from saccade.explain import subject as subjects
from saccade.explain.methods import record
from saccade.train.models.build import create
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError
from safetensors.torch import save_file
from support.families import BEV, SMALL, build

SPARSE = "sparsifiner_deit_t"


@pytest.fixture
def image(tmp_path):
    generator = np.random.default_rng(0)
    file = tmp_path / "image.png"
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


def test_writes_what_the_model_does(command, image, tmp_path, small):
    out = tmp_path / "out"
    arguments = ["biformer_t", image, "--query", "70,50", "--head", "0", "--out", out, "--gif", "--json"]
    code, text, err = command("explain", *arguments)
    assert (code, err) == (0, "")
    facts = json.loads(text)
    one = subject("biformer_t")
    x = one.prepare(Image.open(image))
    records = {r.name: r for r in one.body.attention_maps(x)}
    assert [row["name"] for row in facts["maps"]] == list(records)
    with np.load(out / "maps.npz") as arrays:
        assert int(arrays["head"]) == 0
        for name, one in records.items():
            cell = one.query_at(50, 70, (80, 120))
            assert tuple(arrays[f"{name}/query"]) == cell
            np.testing.assert_allclose(arrays[name], one.map(cell, 0).numpy(), rtol=1e-5, atol=1e-7)
    assert sorted(path.name for path in out.iterdir()) == sorted(facts["files"])
    with Image.open(out / "overview.png") as overview:
        assert overview.width > 1200 and np.asarray(overview).std() > 20  # the image and four maps
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
        (["biformer_t", "none.png"], "error: the image none.png does not exist\n"),
        (["biformer_t", "FOLDER"], "is a folder: give one image"),
        (["biformer_t", "IMAGE", "--method", "gradcam", "--head", "0"], "--head does not apply to --method gradcam"),
        (["biformer_t", "biformer_tt", "--serve"], "there is no run and no model biformer_tt, did you mean biformer_t"),
        (["biformer_t", "--serve", "--pretrained"], "--pretrained does not apply to --serve"),
        (["biformer_t", "TEXT"], "can't be read as an image (unknown format)"),
        (["biformer_tt", "IMAGE"], "there is no run and no model biformer_tt, did you mean biformer_t"),
        (["biformer_t", "IMAGE", "--layer", "stages.9"], "--layer stages.9 is not in biformer_t"),
        (["biformer_t", "IMAGE", "--query", "120,3"], "--query 120,3 is outside the image of 120 x 80 pixels"),
        (["biformer_t", "IMAGE", "--query=-1,3"], "--query -1,3 is outside the image"),
        (["biformer_t", "IMAGE", "--head", "99"], "head must be from 0 to 0 in stages.0.blocks.0.attn:regions, got"),
        (["biformer_t", "IMAGE", "--method", "lime"], "--method must be one of attention, rollout, gradcam"),
        (["biformer_t"], "give an image after the model"),
        (["biformer_t", "IMAGE", "--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["ela_resnet18", "IMAGE", "--method", "rollout"], "--method rollout needs attention between tokens"),
        (["test_resnet", "IMAGE"], "test_resnet has no attention that saccade describes"),
    ],
)
def test_bad_input(command, image, tmp_path, monkeypatch, arguments, sentence):
    def fast(spec, checkpoint=None, *rest):
        known = spec in ("biformer_t", "ela_resnet18") and checkpoint is None
        return subject(spec) if known else load(spec, checkpoint, *rest)

    monkeypatch.setattr("saccade.explain.files.load", fast)
    text = tmp_path / "text.png"
    text.write_text("no image")
    names = dict(IMAGE=image, TEXT=text, FOLDER=tmp_path)
    line = [names.get(argument, argument) for argument in arguments]
    code, out, err = command("explain", *line, "--out", tmp_path / "out")
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "text.png"]


def test_heads_share_routed_regions(image):
    made = subjects._of_model("biformer_t", build("biformer_t", dims=(64, 32, 32, 32)).eval(), "untrained")
    made.size_for = lambda height, width: (64, 64)
    picture = Image.open(image)
    regions, tokens = explain(made, picture, "stages.0.blocks.0", head=1)
    assert (regions.facts["heads"], tokens.facts["heads"], regions.head, tokens.head) == (1, 2, 1, 1)
    first, second = explain(made, picture, "stages.0.blocks.0", head=0)
    assert np.array_equal(regions.values, first.values) and not np.allclose(tokens.values, second.values)
    with pytest.raises(UserError, match=r"head must be from 0 to 1 in stages.0.blocks.0.attn:regions, got 2"):
        explain(made, picture, "stages.0.blocks.0", head=2)


def test_names_the_layers_there_are(image):
    with pytest.raises(UserError, match=r"did you mean stages.0.*: there is stages.0.blocks.0.0.attn:window, "):
        explain(subject("davit_t"), Image.open(image), "stages.0.blocks.0.0.attn:windows")


def test_rollout_is_the_product_of_layers(image):
    torch.manual_seed(0)
    model = timm.create_model(SPARSE, img_size=64, depth=3, dim=48, heads=3, reduce_n=2, coef_topk=4).eval()
    one = subjects._of_model(SPARSE, model, "untrained")
    one.size_for = lambda height, width: (64, 64)
    image = Image.open(image)
    found = explain(one, image, "blocks.2", method="rollout")
    product = torch.eye(17)
    for layer in model.attention_maps(one.prepare(image)):
        if layer.kind == "tokens":
            product = (torch.eye(17) + layer.weights(torch.arange(17))[0].mean(0)) / 2 @ product
    assert [item.name for item in found] == ["blocks.2.attn:rollout"]
    np.testing.assert_allclose(found[0].values.flatten(), product[0, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["biformer_t", "agent_deit_t", "halo_h0"])
def test_gradcam(image, name):
    pytest.importorskip("captum", reason="captum is not installed: pip install 'saccade[explain]'")
    one = subject(name)
    (found,) = explain(one, Image.open(image), method="gradcam", target=2)
    assert found.values.shape == ((4, 4) if name == "agent_deit_t" else (2, 2)) and (found.values >= 0).all()
    if name == "biformer_t":  # by hand: the maps weighted by the mean gradient
        maps = {}
        handle = one.body.stages[3].register_forward_hook(lambda m, i, o: maps.setdefault("x", o).retain_grad())
        one.body(one.prepare(Image.open(image)))[0, 2].backward()
        handle.remove()
        expected = (maps["x"] * maps["x"].grad.mean((2, 3), keepdim=True)).sum(1).relu()[0]
        np.testing.assert_allclose(found.values, expected.detach().numpy(), rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="--target must be a class from 0 to 4, got 9"):
        explain(one, Image.open(image), method="gradcam", target=9)


def test_a_run_and_its_prediction(command, classifier_digits, tmp_path):
    run, image = classifier_digits
    code, text, err = command("explain", run, image, "--method", "gradcam", "--out", tmp_path / "out")
    assert (code, err) == (0, "") and "predicted: " in text and f"weights of the run {run}" in text


@pytest.fixture
def classifier_digits(tmp_path, image):
    """A folder as a run leaves it, of a classifier with ten classes."""
    from saccade.train.models.build import export

    folder = tmp_path / "run"
    folder.mkdir()
    model = timm.create_model("test_resnet", num_classes=10)
    inputs = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    export(model, folder, inputs, [str(i) for i in range(10)])
    return folder, image


CONFIGS = Path(__file__).parents[2] / "configs/scenes"
BACKBONE = f"model={dict(name='biformer_t', n_win=2, topks=(1, 2, 4, -2), **SMALL['biformer_t'])}"
RUNS = dict(
    detector=("mask_rcnn_resnet18", [BACKBONE, "task.channels=16", "task.hidden=32", "task.test_size=(64, 64)"]),
    segmenter=("upernet_biformer_t", [BACKBONE, "task.channels=8", "task.class_weights=None"]),
    lifter=(
        "bev_dfa3d",
        [f"model={dict(name='dfa3d_bev_s', pc_range=(-12.0, -12, -3, 12, 12, 1), **BEV | dict(cams=0))}"],
    ),
)
INPUTS = dict(input_size=(3, 64, 96), mean=(0.5,) * 3, std=(0.5,) * 3, scale=(64, 64))


@pytest.fixture
def untrained_run(tmp_path):
    """untrained_run(kind) -> a folder as a run leaves it, of small untrained models."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        name, overrides = RUNS[kind]
        settings = config.load(CONFIGS / f"{name}.py", overrides)
        names = ["a", "b", "c"]
        data = SimpleNamespace(class_names=names, scale=(64, 64), inputs=lambda cfg: INPUTS, categories=[1, 2, 3])
        task = settings["task"]["type"](data, **{k: v for k, v in settings["task"].items() if k != "type"})
        torch.manual_seed(0)
        task.export(task.model(**settings["model"]), folder, INPUTS, names)
        (folder / "config.py").write_text(config.dump(settings))
        return folder

    return make


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_a_run_that_draws(command, untrained_run, image, tmp_path, kind):
    """The maps are those of the backbone in the run, on the image as the model's own inference resizes it."""
    run = untrained_run(kind)
    code, text, err = command("explain", run, image, "--query", "70,50", "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["weights"] == f"weights of the run {run}" and facts["predicted"]
    loaded = load(str(run))
    assert loaded.prepare(Image.open(image)).shape == (1, 3, 32, 64)  # 43 x 64, by 32s
    records = record(loaded, Image.open(image))
    assert [row["name"] for row in facts["maps"]] == [one.name for one in records]
    with np.load(tmp_path / "out/maps.npz") as arrays:
        one = records[0]
        expected = one.map(one.query_at(50, 70, (80, 120))).numpy()
        np.testing.assert_allclose(arrays[one.name], expected, rtol=1e-5, atol=1e-7)
    code, _, err = command("explain", run, image, "--method", "gradcam", "--out", tmp_path / "none")
    assert code == 2 and "needs a classifier" in err


def test_a_lifter(command, untrained_run, image, tmp_path):
    run = untrained_run("lifter")
    code, text, err = command("explain", run, image, "--out", tmp_path / "out", "--json", "--query=1,7")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    names = [row["name"] for row in facts["maps"]]
    assert {name.rpartition(":")[2] for name in names} == {"time", "cameras"} and "predicted" not in facts
    with np.load(tmp_path / "out/maps.npz") as arrays:
        cameras = next(name for name in names if name.endswith(":cameras"))
        assert tuple(arrays[f"{cameras}/query"]) == (4, 2)  # of 6 x 5 cells over 24 m: rows of 4, columns of 4.8
        assert len(arrays[f"{cameras}/points"])
    code, _, err = command("explain", run, image, "--out", tmp_path / "none", "--query=-3,70")
    assert code == 2 and "outside the view, x from -12 to 12 and y from -12 to 12 metres" in err


def test_weights_of_a_file(command, image, tmp_path, monkeypatch):
    """A name takes the weights of a file, with the classes that it has; --pretrained those that timm publishes."""
    trained = timm.create_model("ela_mobilenetv2", width=0.5, num_classes=7)
    saved = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), saved)
    given = {}

    def small(spec, num_classes, checkpoint=None, new_head=False, pretrained=False):
        given.update(pretrained=pretrained)
        return create(spec, num_classes, checkpoint=checkpoint, new_head=new_head, width=0.5)

    monkeypatch.setattr("saccade.train.predict.create", small)
    code, text, err = command(
        "explain", "ela_mobilenetv2", image, "--checkpoint", saved, "--out", tmp_path / "out", "--json"
    )
    assert (code, err) == (0, "") and json.loads(text)["weights"] == f"weights of {saved}"
    loaded = load("ela_mobilenetv2", saved)
    expected = trained.eval().attention_maps(loaded.prepare(Image.open(image)))[-1]
    with np.load(tmp_path / "out/maps.npz") as arrays:
        np.testing.assert_allclose(arrays[expected.name], expected.map().numpy(), rtol=1e-5, atol=1e-7)
    code, text, _ = command("explain", "ela_mobilenetv2", "--list", "--pretrained")
    assert code == 0 and given["pretrained"]
