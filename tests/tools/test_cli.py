"""The command `saccade`: every command by name, configs of the package by name, one sentence for a mistake."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError

cli = importlib.import_module("saccade.cli")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def saccade(monkeypatch, capfd):
    """saccade(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["saccade", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return call


def test_help_lists_every_command(saccade):
    code, out, _ = saccade("--help")
    assert code == 0
    for name in cli.PROGRAMS + cli.MODULES:
        line = next(line for line in out.splitlines() if line.startswith(f"  {name.replace('_', '-')} "))
        assert cli.first_line(cli._file(name)) and line.endswith(cli.first_line(cli._file(name)))
    assert saccade()[1] == out and saccade("--version")[1].startswith("saccade 0.")


@pytest.mark.parametrize("name", cli.PROGRAMS + cli.MODULES)
def test_each_has_its_help(saccade, name):
    """With an example and the exit codes; docs/cli.md has the command, too."""
    code, out, _ = saccade(name.replace("_", "-"), "--help")
    assert code == 0 and f"usage: saccade {name.replace('_', '-')}" in out
    assert re.search(rf"^ +(python tools/{name}\.py|.*saccade {name.replace('_', '-')})", out, re.MULTILINE), (
        "an example"
    )
    assert "exit code" in out.lower()
    assert f"| `{name.replace('_', '-')}` |" in (ROOT / "docs/cli.md").read_text()


def test_trains_and_tests(saccade, tmp_path):
    """A config by its name, as the programs in tools/ do it."""
    tiny = ["model={'name': 'test_resnet'}", "data.img_size=16", "epochs=1", "batch_size=128", "device=cpu"]
    code, out, err = saccade("train", "digits/biformer_t", *tiny, "--run-dir", tmp_path / "run")
    assert (code, err) == (0, "") and "\x1b" not in out
    assert (tmp_path / "run" / "model.safetensors").is_file()
    code, out, _ = saccade("test", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(out)["images"] == 360
    code, out, _ = saccade("compare", tmp_path / "run", tmp_path / "run")
    assert code == 0 and "test_resnet" in out and "\x1b" not in out


def test_unknown_commands_and_configs(saccade):
    assert saccade("trian") == (2, "", "error: there is no command trian, did you mean train?\n")
    assert saccade("nothing")[::2] == (2, "error: there is no command nothing: `saccade --help` lists them\n")
    code, out, err = saccade("configs", "nowhere")
    assert (code, out) == (2, "") and "no config's name has 'nowhere'" in err and "coco" in err
    with pytest.raises(UserError, match=r"no run digits/bifromer_t, did you mean .*digits/biformer_t"):
        config.load("digits/bifromer_t")


def test_configs(saccade):
    files = {f"{f.parent.name}/{f.stem}" for f in ROOT.glob("configs/*/*.py") if f.parent.name != "_base_"}
    code, out, _ = saccade("configs", "--json")
    found = json.loads(out)
    assert code == 0 and set(found) == {name for name in files if not name.endswith("__init__")}
    assert found["digits/biformer_t"].startswith("BiFormer-T on digits")
    code, out, _ = saccade("configs", "digits/biformer")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["digits/biformer_t"]
    assert config.load("digits/biformer_t") == config.load(ROOT / "configs/digits/biformer_t.py")


def test_zoo(saccade):
    code, out, _ = saccade("zoo", "biformer_t", "--json")
    (row,) = json.loads(out)
    assert code == 0 and (row["name"], row["top1"], row["input_size"]) == ("biformer_t", 81.4, [3, 224, 224])
    assert row["parameters"] == sum(p.numel() for p in timm.create_model("biformer_t", device="meta").parameters())
    assert f"{row['parameters'] / 1e6:.1f} M" in saccade("zoo", "biformer_t")[1]
    assert saccade("zoo", "biformer_x")[::2] == (
        2, "error: no model of saccade matches 'biformer_x': try 'biformer*', or no pattern\n"
    )  # fmt: skip


def test_doctor(saccade, monkeypatch):
    doctor = importlib.import_module("saccade.cli.doctor")
    monkeypatch.setattr(doctor, "_torchvision_fault", lambda: "RuntimeError: operator torchvision::nms does not exist")
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_package", ("train", "no figures"))
    code, out, _ = saccade("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["facts"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    missing = {row["what"]: row["cost"] for row in found["missing"]}
    assert missing["no_such_package (pip install 'saccade[train]')"] == "no figures"
    assert any("torchvision::nms does not exist" in what for what in missing)
    code, out, _ = saccade("doctor")
    assert code == 0 and "without it: no figures" in out
    assert {"torchvision's operators", "C++ compiler", "NCCL", "triton"} <= found["facts"].keys()
    monkeypatch.setattr(doctor, "find_cpp_compiler", lambda: None)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    facts, missing = doctor.examine()
    assert facts["C++ compiler"] == facts["NCCL"] == "none"
    assert dict(missing)["a C++ compiler (apt install g++)"] == "no torch.compile on a CPU, no export to aoti"


def test_completion(saccade, tmp_path, monkeypatch):
    """bash completes commands, options, and names of configs."""
    pytest.importorskip("shtab", reason="shtab, which writes the scripts, is not installed")
    code, script, err = saccade("completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "script").write_text(script)

    def complete(*words) -> set[str]:
        setup = f"source {tmp_path / 'script'}; COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words)}; "
        if not words[-1:] or words[-1].startswith("-") or words[-1] in ("tra", "digits/bif"):
            setup = f"source {tmp_path / 'script'}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        setup += 'compopt() { :; }; _shtab_saccade; printf "%s\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", setup], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert complete("saccade", "tra") == {"train"}
    assert {"--resume", "--run-dir"} <= complete("saccade", "train", "--r")
    assert complete("saccade", "train", "digits/bif") == {"digits/biformer_t"}
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = saccade("completion", "bash")
    assert code == 2 and err == "error: saccade completion needs shtab: pip install 'saccade[completion]'\n"
