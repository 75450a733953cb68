"""tools/shard.py: other readers read what it writes, and a killed run resumes."""

import io
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from saccade.train.data import tar
from saccade.train.data.imagenet import ImageNet
from saccade.train.runtime.errors import run
from support import imagenet

ROOT = Path(__file__).resolve().parents[2]
SPLITS = imagenet.make_images()
INPUTS = dict(input_size=(3, 16, 16), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


@pytest.fixture
def tool(monkeypatch, capfd):
    """tool(*arguments) -> (exit code, stderr)"""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
        code = run(runpy.run_path(str(ROOT / "tools/shard.py"))["main"])
        return code, capfd.readouterr().err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


@pytest.fixture
def original(tmp_path):
    return imagenet.write_tars(tmp_path / "original", SPLITS)


def test_webdataset_reads_them(tool, original, tmp_path):
    """Every sample once, byte by byte, in the order that was asked for; and what the index says is so."""
    import webdataset

    out = tmp_path / "out"
    arguments = ("--samples", 5, "--workers", 2, "--shuffle", 1)
    assert tool(original, out, *arguments)[0] == 0
    assert tool(original, out, "--split", "val", "--samples", 4, "--workers", 1)[0] == 0
    listed = json.loads((out / "index.json").read_text())
    assert listed["classes"] == sorted(imagenet.WNIDS)
    assert [entry["samples"] for entry in listed["shards"].values()] == [5, 5, 5, 5, 4, 4, 4, 2]
    for name, entry in listed["shards"].items():
        assert entry["sha256"] == tar.checksum(out / name) and entry["bytes"] == (out / name).stat().st_size
    for split, files in SPLITS.items():
        names = sorted(str(out / name) for name in listed["shards"] if name.startswith(split))
        read = list(webdataset.WebDataset(names, shardshuffle=False).to_tuple("__key__", "jpg", "cls"))
        found = {Path(key).name: (jpg, listed["classes"][int(label)]) for key, jpg, label in read}
        assert len(read) == len(files)
        assert found == {Path(name).stem: (data, wnid) for name, (wnid, data) in files.items()}
        in_order = [Path(key).name for key, _, _ in read] == [Path(name).stem for name in files]
        assert in_order == (split == "val")

    source, back = ImageNet(str(original)), ImageNet(str(out))
    assert back.class_names == source.class_names
    theirs, ours = source.dataset("val", INPUTS), back.dataset("val", INPUTS)
    assert all(a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(theirs, ours, strict=True))
    assert not back.bad


def test_only_what_is_missing_is_written(tool, original, tmp_path):
    out = tmp_path / "out"
    arguments = (original, out, "--samples", 5, "--workers", 1)
    assert tool(*arguments)[0] == 0
    before, times = contents(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    path = out / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (out / "train-000003.tar").unlink()
    (out / ".train-000003.tar.99.tmp").write_text("half")
    assert tool(*arguments)[0] == 0
    assert contents(out) == before and not list(out.glob(".*.tmp"))
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"train-000002.tar", "train-000003.tar"}


def test_killed_run_resumes(tool, tmp_path):
    """SIGKILL: its workers end too, nothing half-written has a shard's name, and the end is that of an unbroken run."""
    root = imagenet.write_folders(tmp_path / "data", imagenet.make_images(per_class=20, val=1))
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = [root, out, "--samples", 1, "--workers", 2]
    process = subprocess.Popen([sys.executable, ROOT / "tools/shard.py", *map(str, arguments)])
    end = time.monotonic() + 60
    while len(list(out.glob("train-*.tar"))) < 5:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(
        Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text() for child in children
    ):
        assert time.monotonic() < end, "its workers stay"
        time.sleep(0.02)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    known = json.loads((out / ".train.partial.json").read_text())["shards"]
    assert 0 < len(known) <= len(done) < 80, "killed too late"
    assert not (out / "index.json").exists()
    assert tool(*arguments)[0] == 0
    assert {name: (out / name).stat().st_mtime_ns for name in known} == {name: done[name] for name in known}
    assert tool(root, whole, *arguments[2:])[0] == 0
    assert contents(out) == contents(whole) and len(contents(out)) == 81
    assert not (out / ".train.partial.json").exists()


def test_other_images(tool, tmp_path):
    """Formats that webdataset's readers don't expect become PNG; names that are alike stay apart; large ones shrink."""
    root = tmp_path / "pets"
    colours = {"cat/a.b.png": 10, "cat/a.b.jpg": 60, "cat/deep/a.b.jpg": 110, "dog/x.bmp": 160, "dog/y.tif": 210}
    for name, grey in colours.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 80), (grey,) * 3).save(root / name)
    for out, more, sizes in (("plain", (), {(50, 80)}), ("small", ("--resize", 20), {(20, 32)})):
        assert tool(root, tmp_path / out, "--workers", 1, *more)[0] == 0
        source = ImageNet(str(tmp_path / out))
        files, labels = source.images("train")
        assert source.class_names == ["cat", "dog"]
        found = {}
        for i in range(len(files)):
            image = Image.open(io.BytesIO(files.read(i)))
            assert (
                image.size in sizes and f".{image.format.lower().replace('jpeg', 'jpg')}" == Path(files.base(i)).suffix
            )
            found[files.base(i)] = image.convert("RGB").getpixel((5, 5))[0]
        train = dict(ImageNet(str(root))._layout._splits["train"])
        assert sorted(found.values()) == pytest.approx(
            sorted(colours[str(Path(p).relative_to(root))] for p in train), abs=3
        )
        assert [source.class_names[label] for label in labels] == [Path(name).parts[0] for name in found]


def test_mistakes(tool, original, tmp_path):
    out = tmp_path / "out"
    assert tool(original, out, "--samples", 5)[0] == 0
    for other in (("--samples", 6), ("--samples", 5, "--shuffle", 1), ("--samples", 5, "--resize", 9)):
        code, err = tool(original, out, *other)
        assert code == 2 and "has shards of other images or of other sizes" in err
    code, err = tool(original, out, "--samples", 0)
    assert code == 2 and "--samples must be 1 or more, got 0" in err
    code, err = tool(tmp_path / "none", tmp_path / "other")
    assert code == 2 and err.endswith("none is not a folder: give the folder of the images\n")  # not: data.root=
    assert not (tmp_path / "other").exists()
    with FileLock(out / ".lock"):
        code, err = tool(original, out, "--samples", 5)
        assert code == 2 and "another process is writing to" in err
    path = original / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:5000])
    code, err = tool(original, out, "--split", "val")
    assert code == 65 and "of 10 samples: it ends" in err and "shards are only written from complete data" in err
    pets = imagenet.write_folders(tmp_path / "pets", SPLITS)
    bad = next(pets.glob("train/*/*.JPEG"))
    bad.write_bytes(b"no image")
    code, err = tool(pets, tmp_path / "pets_out", "--resize", 20, "--workers", 1)
    assert code == 65 and f"{bad} can't be read as an image" in err and "Traceback" not in err
