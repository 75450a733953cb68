"""ImageNet in all its layouts: the same images and labels, read whole or with what is bad in them named."""

import gzip
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from saccade.train import engine
from saccade.train.data import combined, loader, tar
from saccade.train.data import imagenet as imagenet_data
from saccade.train.data.catalog import open_catalog
from saccade.train.data.imagenet import ImageNet
from saccade.train.data.loader import EvaluationOrder, TrainingOrder, batches
from saccade.train.data.mapped import Mapped
from saccade.train.runtime import checkpoint
from saccade.train.runtime.config import check_typed
from saccade.train.runtime.errors import DATA, UserError
from support import imagenet
from support.jobs import Job

INPUTS = dict(input_size=(3, 16, 16), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
SPLITS = imagenet.make_images()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "saccade"


def patterns(root: Path, **more) -> ImageNet:
    return ImageNet(train=f"{root}/train-*.tar", val=[f"{root}/val-{{0000..0001}}.tar"], **more)


LAYOUTS = dict(
    folder=lambda root: ImageNet(str(imagenet.write_folders(root, SPLITS))),
    tars=lambda root: ImageNet(str(imagenet.write_tars(root, SPLITS))),
    shards=lambda root: ImageNet(str(imagenet.write_shards(root, SPLITS))),
    patterns=lambda root: patterns(imagenet.write_shards(root, SPLITS, listed=False, label="json"), classes=4),
    streams=lambda root: ImageNet(
        train=f"pipe:cat {imagenet.write_shards(root, SPLITS)}/train-{{0000..0003}}.tar",
        val=[f"pipe:cat {root}/val-0000.tar", f"{root}/val-0001.tar"],
        index=f"{root}/index.json",
        cache_dir=f"{root}/fetched",
    ),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_images_in_every_layout(tmp_path, layout):
    """Names, labels and pixels, at the first reading and with what that kept; and for worker processes."""
    for _ in range(2):
        source = LAYOUTS[layout](tmp_path / layout)
        assert source.class_names == (list("0123") if layout == "patterns" else sorted(imagenet.WNIDS))
        for split, files in SPLITS.items():
            images = source.dataset(split, INPUTS)
            expected = ImageNet(str(imagenet.write_folders(tmp_path / "folder", SPLITS))).dataset(split, INPUTS)
            place = {expected.filename(i).partition(".")[0]: i for i in range(len(expected))}
            seen = [images.filename(i).partition(".")[0] for i in range(len(images))]
            assert sorted(seen) == sorted(name.partition(".")[0] for name in files)
            for i, name in enumerate(seen):
                pixels, label = expected[place[name]]
                assert images[i][1] == label == sorted(imagenet.WNIDS).index(files[f"{name}.JPEG"][0])
                assert torch.equal(images[i][0], pixels)
        assert len(source.dataset("test", INPUTS)) == 10 and not source.bad


@pytest.fixture
def be(monkeypatch):
    """be(world, rank) makes this process one of many, as far as the loader sees."""

    def change(world: int, rank: int) -> None:
        monkeypatch.setattr(loader, "world_size", lambda: world)
        monkeypatch.setattr(loader, "rank", lambda: rank)

    return change


@pytest.mark.parametrize("layout", ["tars", "shards"])
def test_everyone_sees_all(tmp_path, be, layout):
    """Evaluation: every image once over 1, 2, 3 processes with 0 or 2 workers. Training: resumed with other numbers."""
    source = LAYOUTS[layout](tmp_path)
    augment = ImageNet(source._layout.root if layout == "tars" else str(tmp_path), augment=dict(hflip=0.5))
    val, train = source.dataset("val", INPUTS), augment.dataset("train", INPUTS, training=True)
    labels = sorted(label for _, label in (val[i] for i in range(10)))
    whole = None
    for world, workers in ((1, 0), (2, 2), (3, 0)):
        seen, parts = [], []
        for rank in range(world):
            be(world, rank)
            for _, found in batches(val, EvaluationOrder(10, 4), 0, workers, CPU):
                seen += found.tolist()
            start = 0 if whole is None else 3
            parts.append([images for images, _ in batches(train, TrainingOrder(24, 6, 1, start, 8), 1, workers, CPU)])
        assert sorted(seen) == labels
        steps = [torch.cat(step) for step in zip(*parts)]
        whole = whole or steps
        assert len(whole) == 8 and all(map(torch.equal, steps, whole[-len(steps) :]))


def test_what_was_found_is_kept(tmp_path, cache, monkeypatch):
    """Beside the tar; in the user's cache where that can't be written; until the tar is another."""
    root, scan = imagenet.write_shards(tmp_path / "data", SPLITS), tar._scan
    scans = []
    monkeypatch.setattr(tar, "_scan", lambda *args: scans.append(args) or scan(*args))
    path = root / "val-0000.tar"
    first = tar.index([path], "shard")[0]
    assert (root / ".val-0000.tar.index.npz").exists() and not cache.exists() and len(scans) == 1
    again = tar.index([path], "shard")[0]
    assert len(scans) == 1 and list(again.names) == list(first.names) and again.truncated == first.truncated == ""
    assert all((getattr(again, k) == getattr(first, k)).all() for k in ("offsets", "sizes", "labels"))
    (root / ".val-0000.tar.index.npz").write_bytes(b"torn")
    tar.index([path], "shard")
    assert len(scans) == 2
    path.write_bytes((root / "val-0001.tar").read_bytes())
    assert len(tar.index([path], "shard")[0].names) == 3 and len(scans) == 3
    (root / ".val-0000.tar.index.npz").unlink()
    (root / ".val-0000.tar.index.npz").mkdir()  # nothing can be written there, as in a folder to read only
    for _ in range(2):
        assert len(tar.index([path], "shard")[0].names) == 3 and len(scans) == 4
    assert len(list(cache.glob("index/*.npz"))) == 1


@pytest.mark.parametrize("listed", [True, False])
def test_truncated_shards(tmp_path, listed):
    """Cut anywhere, a shard loses samples, mostly with no error of tarfile's; it is named, and they are counted."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS, listed=listed)
    path = root / "train-0001.tar"
    whole = path.read_bytes()
    found, truncated = tar._members(path.open("rb"), 0, len(whole))
    assert len(found) == 14 and not truncated
    end = found[-1][1] + 512  # of the last sample; a block of zeros comes after it
    lost = set()
    for cut in [*range(0, end + 512, 512), 100, end - 300, len(whole)]:
        path.write_bytes(whole[:cut])
        source = patterns(root, **(dict(classes=4) if not listed else {}))
        files, labels = source.images("train")
        missing = 24 - len(files)
        assert len(files) == len(labels) and 0 <= missing <= 7
        lost.add(missing)
        counted = sum(count for _, count in source.bad.values())
        if listed:
            assert counted == missing, cut
            assert not missing or f"has {7 - missing} of 7 samples: it " in source.bad[str(path)][0]
        else:
            assert counted == (cut < end + 512) and all(name.startswith(str(path)) for name in source.bad)
        if cut == len(whole) // 2 // 512 * 512:
            files.read(len(files) - 1)
    assert lost == set(range(8))


def test_damaged_headers(tmp_path):
    """A bit that flips in a header ends a tar early, for tarfile; here that is a damaged shard."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    path = root / "train-0001.tar"
    whole = path.read_bytes()
    found, _ = tar._members(path.open("rb"), 0, len(whole))
    for i in (0, 6):
        damaged = bytearray(whole)
        damaged[found[i][1] - 512 + 20] ^= 1
        path.write_bytes(damaged)
        files, _ = (source := patterns(root)).images("train")
        assert len(files) == 17 + i // 2 and source.bad[str(path)][1] == 7 - i // 2
    original = imagenet.write_tars(tmp_path / "tars", SPLITS)
    train = original / "ILSVRC2012_img_train.tar"
    damaged = bytearray(train.read_bytes())
    inner, _ = tar._members(train.open("rb"), 0, len(damaged))
    damaged[inner[1][1] + 20] ^= 1  # the second class: none of its six images is found
    train.write_bytes(damaged)
    source = ImageNet(str(original))
    assert len(source.images("train")[0]) == 18
    assert source.bad == {
        str(train): ("n01443537.tar is not a tar file (bad checksum), with an unknown number of missing samples", 1)
    }
    source.images("val")
    assert len(source.bad) == 1
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert tar._members(packed.open("rb"), 0, packed.stat().st_size) == (
        [],
        "is compressed by gzip: decompress it with gunzip",
    )
    val = original / "ILSVRC2012_img_val.tar"
    val.write_bytes(val.read_bytes()[: -len(val.read_bytes()) // 2])
    (source := ImageNet(str(original))).images("test")
    (said,) = source.bad.values()
    assert 0 < said[1] < 10 and said[0].startswith(f"has {10 - said[1]} of 10 samples: it ends")


@pytest.mark.parametrize("kind", ["shard", "tars"])
def test_no_sample_is_lost_silently(tmp_path, kind):
    """Bytes that change anywhere, in headers above all: the scan ends well, and says so where samples are missing."""
    name = "train-0001.tar" if kind == "shard" else "ILSVRC2012_img_train.tar"
    root = (imagenet.write_shards if kind == "shard" else imagenet.write_tars)(tmp_path / "data", SPLITS)
    whole, path = (root / name).read_bytes(), tmp_path / "damaged.tar"
    members, _ = tar._members((root / name).open("rb"), 0, len(whole))
    random, lost = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        member = members[random.integers(len(members))]
        damaged[member[1] - 512 + random.integers(512)] = random.integers(256)
        damaged[random.integers(len(whole))] = random.integers(256)
        path.write_bytes(damaged)
        found = tar._scan(path, kind)
        if len(found.names) < (7 if kind == "shard" else 24):
            assert found.truncated or found.incomplete
            lost += 1
    assert lost > 100


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(), "data needs either root, a folder, or train and val"),
        (dict(root="x", train="y"), "data needs either root, a folder, or train and val"),
        (dict(root="x", classes=4), "data.index, data.classes and data.cache_dir go with data.train"),
        (dict(train="{root}/none-*.tar"), r"there is no shard .*/none-\*.tar$"),
        (dict(train="{root}/train-{{0000..0005}}.tar"), r"there is no shard .*/train-0004.tar \(of .*0000..0005"),
        (dict(train="{root}/train-{{0..3.tar"), "is not a valid pattern of shards"),
        (dict(train="{root}/train-*.tar", classes=5), "data.classes=5, but .*index.json has 4"),
        (dict(train="{root}/train-*.tar", index="{root}/train-0000.tar"), "train-0000.tar is not an index of shards "),
        (dict(val="{root}/val-*.tar"), "data.train is missing: give the shards of that split"),
        (dict(train="pipe:false", index="{root}/index.json"), r"pipe:false can't be fetched .*exit 1"),
        (dict(root="{root}/nowhere"), "data.root=.*/nowhere is not a folder"),
        (dict(root="{root}", max_bad=-1), "data.max_bad=-1 must be 0 or more"),
        (dict(root="{root}", sizes={1: 16}), r"data.sizes=\{1: 16\} must give sizes in pixels from epoch 0 on"),
        (dict(root="{root}", sizes={0: "big"}), "must give sizes in pixels from epoch 0 on"),
    ],
)
def test_arguments(tmp_path, change, sentence):
    root = imagenet.write_shards(tmp_path, SPLITS)
    given = {k: v.format(root=root) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(UserError, match=sentence):
        ImageNet(**given).images("train")


def test_labels_of_shards(tmp_path):
    """Other labels than there are classes, and none at all."""
    root = imagenet.write_shards(tmp_path, SPLITS, listed=False)
    with pytest.raises(UserError, match=r"train-0001.tar!n02084071_3.jpg has label 2, and there are 2 classes"):
        patterns(root, classes=2).images("train")
    with pytest.raises(UserError, match="classes is missing: the shards have no index"):
        patterns(root)
    members = {
        "a.jpg": imagenet.make_jpeg(0),
        "a.cls": b"cat",
        "b.png": b"",
        "c.cls": b"1",
        "d.jpg": b"",
        "d.cls": b"1",
    }
    (root / "odd.tar").write_bytes(imagenet.make_tar(members | {"set.json": b"{}", "d.txt": b"a caption"}))
    source = ImageNet(train=str(root / "odd.tar"), val=f"{root}/val-*.tar", classes=4)
    assert len(source.images("train")[0]) == 1
    said = {name.rpartition("!")[2]: reason for name, (reason, _) in source.bad.items()}
    assert said == {"a.jpg": "has no label", "b.png": "has no label", "c": "has a label but no image"}


def test_samples_that_are_lost_have_names(tmp_path, capsys):
    """Two images or labels under one key, dots in keys, members that make no sample; labels that are no number."""
    data = imagenet.make_jpeg(0)
    members = [("a.jpg", data), ("a.cls", b"\xef\xbb\xbf1\r\n"), ("a.txt", b"a caption"), ("a.depth.png", data)]
    members += [("a.jpg", data), ("a.png", data), ("a.cls", b"1"), ("a.cls", b"2")]  # the third label is a's own
    members += [("b.v2.jpg", data), ("b.cls", b"0"), ("c.jpg", data), ("c.json", b'{"label": 2.0}')]
    members += [("d.jpg", data), ("d.json", b'{"label": 2.5}'), ("e.jpg", data), ("e.json", b'{"label": true}')]
    members += [("f.tif", data), ("f.cls", b"0"), ("notes.txt", b""), ("deep/._a.jpg", b""), ("README", b"")]
    members += [("g.jpg", data), ("g.cls", b"9" * 30), ("h.jpg", data), ("h.json", b'{"label": "3"}')]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            shard.addfile(header, io.BytesIO(content))
    (tmp_path / "odd.tar").write_bytes(file.getvalue())
    for _ in range(2):  # from the tar, and from what is kept of it
        source = ImageNet(train=str(tmp_path / "odd.tar"), val=str(tmp_path / "odd.tar"), classes=4)
        files, labels = source.images("train")
        assert {files.base(i): int(labels[i]) for i in range(len(files))} == {"a.jpg": 1, "c.jpg": 2, "h.jpg": 3}
        lost = {name.rpartition("!")[2].partition(" at ")[0]: reason for name, (reason, _) in source.bad.items()}
        assert len(source.bad) == sum(count for _, count in source.bad.values()) == 9
        assert lost == {
            "a.jpg": "is a second image under the key a, after a.jpg",
            "a.png": "is a second image under the key a, after a.jpg",
            "a.cls": "is a second label, 2, under the key a",
            "b.v2.jpg": "has no label (its key is b: a key ends at the first dot)",
            "b": "has a label but no image",
            "d.jpg": "has no label",
            "e.jpg": "has no label",
            "f": "has a label but no image",
            "g.jpg": "has no label",
        }
        out = capsys.readouterr().out
        assert "belong to no sample: 2 .json, 1 .tif, 1 .txt, 1 hidden, 1 without extension\n" in out


def test_devkit(tmp_path):
    root = imagenet.write_tars(tmp_path, SPLITS)
    kit = root / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()
    kit.write_bytes(whole[:200])
    with pytest.raises(UserError, match="can't be read as ImageNet's development kit"):
        ImageNet(str(root))
    kit.write_bytes(imagenet.make_devkit(imagenet.WNIDS[1:], [imagenet.WNIDS[1]] * 10))
    with pytest.raises(UserError, match=r"train.tar!n01440764.tar/n01440764_3.JPEG is no image that .* knows"):
        ImageNet(str(root)).images("train")
    kit.write_bytes(whole)
    (root / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(UserError, match=r"train\.tar, which has the train split, does not exist"):
        ImageNet(str(root)).images("train")


def test_streams_are_fetched_once(tmp_path):
    """By several processes at a time too, and only if they are what the index says."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    listed = json.loads((root / "index.json").read_text())
    for name, entry in listed["shards"].items():
        entry["sha256"] = tar.checksum(root / name)
    (root / "index.json").write_text(json.dumps(listed))
    log, cache = tmp_path / "log", tmp_path / "fetched"
    stream = f"pipe:echo >> {log}; sleep 0.2; cat {root}/val-0000.tar"
    source = ImageNet(val=stream, index=str(root / "index.json"), cache_dir=str(cache))
    with ThreadPoolExecutor(3) as pool:  # the lock is as between processes
        fetched = [files for files, _ in pool.map(source.images, ["val"] * 3)]
    assert [len(files) for files in fetched] == [7, 7, 7] and not source.bad
    assert log.read_text() == "\n"
    for path in cache.glob("*.tar"):
        path.unlink()
    (root / "val-0000.tar").write_bytes((root / "val-0001.tar").read_bytes())
    with pytest.raises(UserError, match="that do not match the index") as error:
        source.images("val")
    assert error.value.code == DATA and not list(cache.glob("*.tar")) and not list(cache.glob(".*.tmp"))


def test_sizes(tmp_path):
    """Training images grow with the epochs; those of evaluation do not."""
    source = ImageNet(str(imagenet.write_folders(tmp_path, SPLITS)), img_size=24, sizes={0: 16, 2: 20, 3: 24})
    inputs = source.inputs(dict(INPUTS))
    assert inputs["input_size"] == (3, 24, 24)
    train = source.dataset("train", inputs, training=True)
    for workers in (0, 1):
        loaded = batches(train, TrainingOrder(24, 12, 0, 1, 10), 0, workers, CPU)
        assert [images.shape[-1] for images, _ in loaded] == [16] * 3 + [20] * 2 + [24] * 4
    assert source.dataset("val", inputs)[0][0].shape == (3, 24, 24)
    check_typed("data", dict(type=ImageNet, root="x", sizes={0: 16}, train=["a", "b"]))


CONFIG = """
from saccade.train.data.catalog import open_catalog
from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="test_resnet")
data = dict(type=ImageNet, root="{root}", img_size=16, sizes={{0: 16, 1: 24}}, max_bad={budget})
task = dict(type=Classify)
optimizer = dict(opt="sgd", lr=0.05)
schedule = dict(sched="cosine")
epochs = 2
batch_size = 6
log_every = 1
device = "cpu"
"""


@pytest.fixture
def spoilt(tmp_path):
    """A folder of ImageNet with two bad training images and a bad one to evaluate on, and a config with a budget."""
    root = imagenet.write_folders(tmp_path / "data", SPLITS)
    for path in ("train/n01440764/n01440764_13.JPEG", "train/n03000134/n03000134_3.JPEG"):
        (root / path).write_bytes((root / path).read_bytes()[:300])
    next(root.glob("val/*/ILSVRC2012_val_00000004.JPEG")).write_bytes(b"no image")
    config = tmp_path / "spoilt.py"
    config.write_text(CONFIG.format(root=root, budget=3))
    return config


def test_run_with_bad_images(command, spoilt, tmp_path, records, monkeypatch):
    """Within the budget they are listed, counted and left out; a run that was stopped ends as the whole one."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    code, _, err = command("train", spoilt, "--run-dir", whole)
    assert (code, err) == (0, "")
    listed = (whole / "bad_images.txt").read_text()
    assert listed.count("\n") == 3 and listed.count("can't be read as an image") == 3
    assert [(line["images"], line["skipped"]) for line in records(whole, "val")] == [(9, 1), (9, 1)]
    agreed, taken = engine.StopRequest.agreed, []

    def stop_in_the_middle(request, bad, wait=False) -> bool:
        taken.append(agreed(request, bad, wait))
        return len(taken) == 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.StopRequest, "agreed", stop_in_the_middle)
        assert command("train", spoilt, "--run-dir", parted)[0] == 75
    assert command("train", spoilt, "--run-dir", parted, "workers=1", "--resume")[0] == 0
    assert records(parted) == records(whole)
    assert sorted((parted / "bad_images.txt").read_text().splitlines()) == sorted(listed.splitlines())
    ends = [checkpoint.read(run / "checkpoints" / checkpoint.LAST) for run in (whole, parted)]
    assert all(torch.equal(tensor, ends[1][0][name]) for name, tensor in ends[0][0].items())

    assert command("test", whole, "--split", "val", "data.max_bad=1", "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["skipped"] == 1
    code, _, err = command("test", whole, "--split", "val", "data.max_bad=0", "--out", tmp_path / "out")
    assert code == 65 and "ILSVRC2012_val_00000004.JPEG can't be read as an image (unknown format)" in err


def test_command_line(command, spoilt, tmp_path, records):
    """Patterns and lists instead of the config's folder; a truncated shard beyond `max_bad` ends the run at once."""
    root = imagenet.write_shards(tmp_path / "shards", SPLITS)
    lists = repr([f"{root}/val-0000.tar", f"{root}/val-0001.tar"])
    given = ["data.root=None", f"data.train={root}/train-{{0000..0003}}.tar", f"data.val={lists}", "epochs=1"]
    assert command("train", spoilt, *given, "--run-dir", tmp_path / "run")[::2] == (0, "")
    assert records(tmp_path / "run", "val")[0]["images"] == 10
    path = root / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:4096])
    code, _, err = command("train", spoilt, *given, "data.max_bad=1", "--run-dir", tmp_path / "torn")
    assert code == 65 and err.startswith(f"error: {path} has ") and "log.jsonl" not in os.listdir(tmp_path / "torn")
    assert (tmp_path / "torn/bad_images.txt").read_text().split("\t")[1] == str(path)


def test_ten_to_the_nine_images(tmp_path):
    """They start within seconds of CPU time and within 2 GB, at any step."""
    job = Job(Path(__file__).with_name("growth.py"), tmp_path, processes=0)
    assert job.wait(120) == 0, job.text()
    found = json.loads(job.text())
    assert found["images"] == 10**9 and found["seen"] > 11_900
    assert found["cpu_seconds"] < 5
    assert found["after"]["VmHWM"] < 2 and found["after"]["RssAnon"] - found["before"]["RssAnon"] < 0.5


def test_many_shards(tmp_path, cache, monkeypatch):
    """More shards than are read at each start have one index, and give what each shard's own index gives."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    source = ImageNet(str(root))
    few = {split: source._layout.images(split) for split in ("train", "val")}
    monkeypatch.setattr(imagenet_data, "SHARDS", 1)
    for start in range(3):  # written, then opened, also without a look at all shards
        source = ImageNet(str(root))
        for split, (files, labels) in few.items():
            many, numbers = source._layout.images(split)
            assert isinstance(numbers, Mapped) and numbers[:].tolist() == labels.tolist()
            assert source.class_counts(split) == np.bincount(labels, minlength=len(source.class_names)).tolist()
            assert [many.name(i) for i in range(len(many))] == [files.name(i) for i in range(len(files))]
            assert all(many.read(i) == files.read(i) for i in range(len(files)))
        assert not source.bad and len(list(root.glob(".*.index"))) == 2 and len(list(root.glob(".*.shards"))) == 1
        monkeypatch.setattr(combined, "_write", None)
        if start == 1:
            monkeypatch.setattr(imagenet_data, "read_index", None)
            monkeypatch.setattr(combined, "_stamp", None)
    dataset = source.dataset("train", INPUTS)
    again = pickle.loads(pickle.dumps(dataset))
    assert (
        len(pickle.dumps(dataset)) < 20_000 and again[3][1] == dataset[3][1] and torch.equal(again[3][0], dataset[3][0])
    )


def test_a_shard_that_changes_between_starts(tmp_path, cache, monkeypatch):
    """A start that has not looked at it finds it when it is read; the next one indexes it again."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    monkeypatch.setattr(imagenet_data, "SHARDS", 1)
    monkeypatch.setattr(combined, "SAMPLED", 1)  # the first
    before = [ImageNet(str(root))._layout.images("train")[0].read(i) for i in range(24)]
    path, kept = root / "train-0002.tar", ImageNet(str(root))._layout.images("train")[0]
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match="has changed since it was indexed"):
        kept.read(15)
    assert kept.read(6) == before[6]
    written, write = [], combined._write
    monkeypatch.setattr(combined, "_write", lambda *given: written.append(given) or write(*given))
    again = ImageNet(str(root))._layout.images("train")[0]
    assert len(written) == 1 and [again.read(i) for i in range(24)] == before
    os.utime(root / "train-0000.tar", (1, 1))  # one of those that each start looks at
    assert ImageNet(str(root))._layout.images("train")[0].read(0) == before[0] and len(written) == 2


def test_a_catalog_that_is_damaged_or_old(tmp_path, cache, monkeypatch):
    """index.json is read again; so it is where no folder can be written to."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    monkeypatch.setattr(imagenet_data, "SHARDS", 1)
    classes = ImageNet(str(root)).class_names
    (folder,) = root.glob(".*.shards")
    for name in ("meta.json", "names.u1", "ends.i8", "samples.i8"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-8])
        assert open_catalog(root / "index.json") is None
        assert ImageNet(str(root)).class_names == classes and open_catalog(root / "index.json") is not None
    listed = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(listed | dict(classes=["x", *classes[1:]])))
    assert open_catalog(root / "index.json") is None and ImageNet(str(root)).class_names[0] == "x"
    monkeypatch.setattr("saccade.train.data.catalog._places", lambda listed: [Path(os.devnull, "folder")])
    assert ImageNet(str(root)).class_names[0] == "x"


def test_many_shards_that_change(tmp_path, cache, monkeypatch):
    """The index is written again; shards without all of their samples and with wrong labels are named as few are."""
    root = imagenet.write_shards(tmp_path / "data", SPLITS)
    monkeypatch.setattr(imagenet_data, "SHARDS", 1)
    whole = len(ImageNet(str(root))._layout.images("train")[0])
    path = root / "train-0001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / f".{path.name}.index.npz").unlink()
    source = ImageNet(str(root), max_bad=99)
    files, _ = source.images("train")
    ((name, (reason, count)),) = source.bad.items()
    assert name == str(path) and f"has {7 - count} of 7 samples: it " in reason and len(files) == whole - count
    listed = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(listed | dict(classes=listed["classes"][:1])))
    with pytest.raises(UserError, match=r"\.tar!.* has label 1, and there are 1 classes: labels are 0 … 0$"):
        ImageNet(str(root)).images("train")
