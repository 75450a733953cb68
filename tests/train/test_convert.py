"""Published files become ours and back again, bit for bit; what does not fit is refused with its keys."""

import hashlib
import json

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from safetensors import safe_open
from support import parity
from support.families import SMALL, build
from support.levels import exhaustive

# A published state dict of each family.
CASES = [
    exhaustive("biformer", "biformer_tiny", "biformer_t", {}),
    exhaustive("davit", "davit_tiny", "davit_t", {}),
    exhaustive("halonet", "halonet26t", "halo_26t", {}),
    exhaustive("nat", "nat_mini_224", "nat_m", {}),
    ("patnet", "patnet_t0", "patnet_t0", {}),
    exhaustive("sparsifiner", "sparsifiner_t_keep25_b2", "sparsifiner_deit_t", {}),
    exhaustive("ela", "mobilenetv2_ela_l", "ela_mobilenetv2", {}),
    exhaustive("ulsam", "mobilenetv2_ulsam_14_17_g4", "ulsam_mobilenet_v2", {}),
]


def save_published(file, system: str, fixture: str, container: str | None = "model"):
    """Write a published state dict, in float32; return it."""
    state = {key: value.float() for key, value in parity.weights(parity.load(system, fixture)).items()}
    torch.save({container: state} if container else state, file)
    return state


@pytest.mark.parametrize(("system", "fixture", "name", "kwargs"), CASES)
def test_there_and_back(command, tmp_path, system, fixture, name, kwargs):
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.pth"
    state = save_published(theirs, system, fixture)
    code, out, err = command("convert", theirs, ours, "--model", name, *(f"{k}={v}" for k, v in kwargs.items()))
    assert (code, err) == (0, "") and "equal bit for bit" in out
    load = dict(pretrained=True, **kwargs)
    expected = timm.create_model(name, pretrained_cfg_overlay=dict(file=str(theirs)), **load).state_dict()
    found = timm.create_model(name, pretrained_cfg_overlay=dict(file=str(ours)), **load).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    with safe_open(ours, "pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["source"] == "theirs.pth" and provenance["model"] == name
    assert provenance["sha256"] == hashlib.sha256(theirs.read_bytes()).hexdigest()
    assert provenance["converter"].startswith("saccade ") and provenance["date"].startswith("20")
    assert "license" in provenance and provenance["origin"].startswith("https://")

    code, out, err = command("convert", ours, back, "--to", "published")
    assert (code, err) == (0, "")
    again = torch.load(back, weights_only=True)["model"]
    assert not again.keys() - state.keys()
    assert all(torch.equal(again[key], state[key]) for key in again)
    assert not [key for key in state.keys() - again.keys() if not key.endswith(("num_batches_tracked", "index"))]


@pytest.mark.exhaustive
def test_trained_weights_under_published_keys(command, tmp_path):
    """Of a model that was not converted: the keys are those of a file of the authors'."""
    theirs, back = tmp_path / "theirs.pth", tmp_path / "back.pth"
    state = save_published(theirs, "biformer", "biformer_tiny", "state_dict")
    model = timm.create_model("biformer_t")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    arguments = ("convert", tmp_path / "own.pth", back, "--to", "published", "--like", theirs)
    assert command(*arguments)[0] == 2  # whose model?
    assert command(*arguments, "--model", "biformer_t")[0] == 0
    assert torch.load(back, weights_only=True)["state_dict"].keys() == state.keys()
    again = timm.create_model("biformer_t", pretrained=True, pretrained_cfg_overlay=dict(file=str(back)))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_refusals(command, tmp_path):
    """One sentence each, and no file."""
    theirs, out, small = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", SMALL["biformer_t"]
    state = build("biformer_t").state_dict()
    sizes = ("num_classes=5", *(f"{key}={value}" for key, value in small.items()))
    torch.save(state, theirs)
    first, last = next(iter(state)), list(state)[-1]
    named = (theirs, out, "--model", "biformer_t")
    cases = [((theirs, out), "--model is missing")]
    cases += [((theirs, tmp_path / "ours.pth", "--model", "biformer_t"), "must be a file that ends in .safetensors")]
    cases += [((theirs, out, "--model", "biformer_tt"), "unknown model biformer_tt, did you mean biformer_t")]
    cases += [((theirs, out, "--model", "resnet18"), "resnet18 is no model of saccade")]
    cases += [((*named, "width=3"), "biformer_t can't be built with")]
    cases += [((*named, "width"), "must be key=value, got width")]
    cases += [((*named, *sizes[1:]), "head.fc.weight is (5, 32) there and (1000, 32) here")]
    cases += [((*named, *sizes, "dims=(32, 32, 32, 64)"), "does not fit biformer_t")]
    cases += [((tmp_path / "none.pth", *named[1:], *sizes), "there is no checkpoint")]
    cases += [((*named, "--like", theirs), "--like does not apply to --to saccade")]
    cases += [((theirs, tmp_path / "b.pth", "--to", "published", "--model", "biformer_t"), "has no record of the auth")]
    torch.save(dict(model=Evil()), tmp_path / "evil.pth")
    cases += [((tmp_path / "evil.pth", *named[1:], *sizes), "can run code")]
    (tmp_path / "page.pth").write_text("<html>")
    cases += [((tmp_path / "page.pth", *named[1:], *sizes), "is a web page")]
    body = [key for key in state if key.startswith("stages.")]
    torch.save({key: value for key, value in state.items() if key not in body[:3]}, tmp_path / "less.pth")
    cases += [((tmp_path / "less.pth", *named[1:], *sizes), f"{body[0]} is missing there and")]
    cases += [((tmp_path / "less.pth", *named[1:], *sizes), f"{body[2]} is missing there and")]
    torch.save(state | {"more": state[last], first: state[last]}, tmp_path / "more.pth")
    cases += [((tmp_path / "more.pth", *named[1:], *sizes), "more is not there")]
    dense = {key: value for key, value in state.items() if not key.startswith(("head.", "norm."))}
    torch.save(dense, tmp_path / "dense.pth")
    cases += [((tmp_path / "dense.pth", *named[1:], *sizes), "has no values of norm.")]
    for arguments, sentence in cases:
        code, said, err = command("convert", *arguments)
        assert code == 2 and sentence in err and err.count("\n") == 1 and "code ran" not in said, (arguments, err)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    out.write_text("mine")
    assert "exists" in command("convert", *named, *sizes)[2] and out.read_text() == "mine"
