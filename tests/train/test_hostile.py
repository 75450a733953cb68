"""Files that somebody made to do harm: refused in one sentence, never run, and read in little memory."""

import io
import json
import pickle
import random
import re
import resource
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from PIL import Image
from saccade.train.data import coco_json, tar
from saccade.train.data.ade20k import Folders
from saccade.train.data.augment import Augment, _jpeg, _read_header
from saccade.train.data.bad_images import BadImage, BadImages
from saccade.train.data.imagenet import read_index
from saccade.train.data.images import Images, decode
from saccade.train.data.loader import EvaluationOrder, TrainingOrder, batches
from saccade.train.data.nuscenes_tables import check_tables
from saccade.train.models import load_published
from saccade.train.models.class_names import read_class_map
from saccade.train.models.weights import class_names_of_run, read_weights
from saccade.train.predict import predictor
from saccade.train.runtime import checkpoint, config
from saccade.train.runtime.checkpoint import label_names
from saccade.train.runtime.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.fuzz import mutate_bytes, mutate_json
from support.levels import exhaustive
from timm.data import create_transform

ROOT = Path(__file__).parents[2]
DIGITS, FINETUNE = ROOT / "configs/digits/resnet18.py", ROOT / "configs/finetune/folder.py"
DATA = [DIGITS, "model.name=test_resnet", "data.img_size=16", "device=cpu"]


class Bomb:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def bombs(tmp_path):
    """Pickles with code in torch's formats, old and new, bare, and under other names; and the file that they make."""
    mark, folder = tmp_path / "went off", tmp_path / "bombs"
    folder.mkdir()
    content = dict(state_dict=dict(a=torch.zeros(1)), meta=Bomb(mark))
    torch.save(content, folder / "new.pth")
    torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.bin").write_bytes(pickle.dumps(content))
    shutil.copy(folder / "new.pth", folder / "renamed.safetensors")
    (folder / "renamed.pth.tar").write_bytes(pickle.dumps(Bomb(mark), protocol=0))
    yield sorted(folder.iterdir()), mark
    assert not mark.exists()


def one_sentence(result, *words: str) -> None:
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    assert all(word in err for word in words), err


def test_pickles_as_checkpoints(bombs, command, tmp_path, detector_arguments):
    files, mark = bombs
    for file in files:
        with pytest.raises(UserError) as error:
            read_weights(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert re.search("holds Python objects|can't be read|is not a file of|is text, not", str(error.value))
        with pytest.raises(UserError):
            load_published("coco/mask_rcnn_biformer_s_1x", file)
    file = files[1]
    one_sentence(command("train", *DATA, f"checkpoint={file}", "--run-dir", tmp_path / "run"), str(file))
    one_sentence(command("test", *DATA, "--checkpoint", file, "--out", tmp_path / "out"), str(file))
    image = commands(tmp_path, tmp_path)["explain"][1]
    explain = ["biformer_t", image, "--checkpoint", file, "--out", tmp_path / "explained"]
    one_sentence(command("explain", *explain), str(file))
    probe = ["model.name=test_resnet", "device=cpu", f"data.root={tmp_path}", f"checkpoint={file}"]
    pictures(tmp_path)
    one_sentence(command("probe", ROOT / "configs/finetune/knn.py", *probe, "--out", tmp_path / "probe"), str(file))
    assert not mark.exists()


def test_pickles_through_timm(bombs):
    """timm's own path to a file that a user names."""
    for file in bombs[0]:
        with pytest.raises((RuntimeError, SafetensorError), match=r"blocked loading this checkpoint|header too large"):
            timm.create_model("biformer_t", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def pictures(root: Path, count: int = 4) -> Path:
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            for i in range(count):
                path = root / split / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (40 * i, 0, 99)).save(path)
    return root


@pytest.fixture
def stranger(classifier_run, tmp_path):
    """The folder of a run that somebody else may have changed."""
    shutil.copytree(classifier_run, tmp_path / "stranger")
    return tmp_path / "stranger"


def commands(run: Path, tmp_path: Path) -> dict[str, list]:
    """What people do with the folder of another person's run."""
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    return dict(
        predict=[run, image],
        test=[run, "--out", tmp_path / "out"],
        convert=[run, tmp_path / "out.pth", "--to", "openmmlab"],
        compare=[run, run],
        explain=[run, image, "--out", tmp_path / "explained"],
        train=[run, "--resume"],
        export=[run, tmp_path / "out.onnx", "--to", "onnx"],
    )


def test_pickles_in_a_run(stranger, bombs, command, tmp_path):
    files, mark = bombs
    for name in ("model.safetensors", "checkpoints/last.safetensors", "checkpoints/previous.safetensors"):
        shutil.copy(files[1], stranger / name)
    lines = commands(stranger, tmp_path)
    for tool in ("predict", "test", "convert", "train", "explain"):
        one_sentence(command(tool, *lines[tool]))
        assert not mark.exists(), tool


CODE = [
    "import os\nos.system('touch {mark}')",
    "x = __import__('os').system('touch {mark}')",
    "from os import system\nx = dict(type=system)",
    "from subprocess import Popen\ndata = dict(type=Popen, args=['touch', '{mark}'])",
    "from saccade.train.data.tar import Path\ndata = dict(type=Path)",
    "x = [open('{mark}', 'w') for _ in range(1)]",
    "x = (lambda: open('{mark}', 'w'))()",
    "x = dict(a=open('{mark}', 'w'))",
    "x = {{**open('{mark}', 'w')}}",
    "x = f'{{open({mark!r}, chr(119))}}'",
    "x: open('{mark}', 'w') = 1",
    "class A:\n    open('{mark}', 'w')",
    "def f(x=open('{mark}', 'w')): pass",
    "with open('{mark}', 'w') as x: pass",
    "from mmengine.config import read_base\nwith read_base():\n    from os import *",
    "if True:\n    open('{mark}', 'w')",
    "data = dict(root='pipe:touch {mark}')",
    "data = dict(root=['a', '  pipe:touch {mark}'])",
    """data = dict(root="https://x/a.tar'; touch {mark}; '")""",
    "x = " + "(" * 500 + ")" * 500,
]


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_the_config_of_a_run_is_read_not_run(stranger, tmp_path, code):
    mark, file = tmp_path / "went off", stranger / "config.py"
    text = file.read_text()
    for changed in (text + code.format(mark=mark), code.format(mark=mark)):
        file.write_text(changed)
        for path in (file, stranger):
            with pytest.raises(UserError) as error:
                config.load(path)
            assert "is not in the form that a run writes, and is not run as code" in str(error.value), error.value
            assert "\n" not in str(error.value)
        with pytest.raises(UserError):
            predictor(stranger, "cpu")
    assert not mark.exists()


def test_every_command_reads_the_config_of_a_run(stranger, command, tmp_path):
    """os.system in config.py: none of the commands that take a run's folder runs it."""
    mark, file = tmp_path / "went off", stranger / "config.py"
    text = file.read_text()
    file.write_text(f"{text}import os\nos.system('touch {mark}')\n")
    for tool, line in commands(stranger, tmp_path).items():
        one_sentence(command(tool, *line), "is not run as code (line ", "import os")
    assert not mark.exists()
    file.write_text(text)
    assert config.load(stranger)["model"]["name"] == "test_resnet"


def test_own_classes_of_a_run(tmp_path, monkeypatch):
    """A class of the user's own is named in a run's config only where the environment says so."""
    (tmp_path / "mine.py").write_text("class Data:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.py").write_text("from mine import Data\n\ndata = dict(type=Data)\n")
    with pytest.raises(UserError, match=r"it imports mine, which may run code; SACCADE_MODULES=mine allows it"):
        config.load(tmp_path)
    monkeypatch.setenv("SACCADE_MODULES", "other,mine")
    assert config.load(tmp_path)["data"]["type"].__name__ == "Data"


def header(entries: dict, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


F32 = dict(dtype="F32", shape=[4])
SAFETENSORS = {
    "zero length": b"",
    "no header": b"\x00" * 7,
    "cut": header(dict(a=F32 | dict(data_offsets=[0, 16]))) + bytes(8),
    "huge header": header({}, 2**40),
    "header of 200 MB": header({}, 200 << 20) + bytes(100),
    "same offsets": header({n: F32 | dict(data_offsets=[0, 16]) for n in "ab"}) + bytes(16),
    "overlap": header(dict(a=F32 | dict(data_offsets=[0, 16]), b=F32 | dict(data_offsets=[8, 24]))) + bytes(24),
    "hole": header(dict(a=F32 | dict(data_offsets=[0, 16]), b=F32 | dict(data_offsets=[32, 48]))) + bytes(48),
    "another shape": header(dict(a=dict(dtype="F32", shape=[5], data_offsets=[0, 16]))) + bytes(16),
    "huge shape": header(dict(a=dict(dtype="F32", shape=[2**62, 4], data_offsets=[0, 16]))) + bytes(16),
    "backwards": header(dict(a=F32 | dict(data_offsets=[16, 0]))) + bytes(16),
    "beyond": header(dict(a=F32 | dict(data_offsets=[2**63, 2**63 + 16]))) + bytes(16),
    "twice": struct.pack("<Q", 110)
    + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(56)
    + bytes(4),
    "other dtype": header(dict(a=dict(dtype="X9", shape=[4], data_offsets=[0, 16]))) + bytes(16),
    "not JSON": struct.pack("<Q", 4) + b"\xff{]}",
    "a list": header([]) + bytes(4),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors(tmp_path, kind):
    """As weights, as a run's checkpoint, and through the class names: refused, in little memory."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(SAFETENSORS[kind])
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(checkpoint.Unreadable):
        checkpoint.read(path)
    assert class_names_of_run(path) is None


def test_tensors_of_other_shapes(classifier_run, stranger, command, tmp_path):
    tensors = load_file(stranger / "model.safetensors")
    save_file(tensors | {"fc.weight": torch.zeros(10, 3)}, stranger / "model.safetensors")
    result = command("predict", stranger, commands(stranger, tmp_path)["predict"][1])
    one_sentence(result, "fc.weight")


# Tar files --------------------------------------------------------------------------------------------------------


def shard(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def png(size=(4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def test_members_that_are_no_files(tmp_path, monkeypatch):
    """Nothing is extracted: links, devices and folders are no samples, and a name with .. is a name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "secret.png").write_bytes(png())
    good = [(member("a.png"), png()), (member("a.cls"), b"1")]
    bad = [
        (member("../../up.png"), png()), (member("../../up.cls"), b"0"),
        (member("/etc/absolute.png"), png()), (member("/etc/absolute.cls"), b"0"),
        (member("b.png", tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png")), b""), (member("b.cls"), b"0"),
        (member("c.png", tarfile.LNKTYPE, linkname="a.png"), b""), (member("c.cls"), b"0"),
        (member("d.png", tarfile.CHRTYPE, devmajor=1, devminor=5), b""), (member("d.cls"), b"0"),
        (member("e.png", tarfile.FIFOTYPE), b""), (member("e.cls"), b"0"),
        (member("f.png", tarfile.DIRTYPE), b""), (member("f.cls"), b"0"),
    ]  # fmt: skip
    path = shard(tmp_path / "x.tar", *good, *bad)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    (found,) = tar.index([path], "shard")
    names = list(found.names)
    assert names == ["a.png", "../../up.png", "/etc/absolute.png"] and found.truncated == ""
    assert set(found.incomplete) == set("bcdef")
    files = tar.Members.concatenated([(path, found)])
    assert all(files.read(i) == png() for i in range(3))
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} - before <= {tmp_path / ".x.tar.index.npz"}


def test_sparse_members(tmp_path):
    """A member that claims a terabyte of holes is no image; what follows it is found."""
    info = member("big.png")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40),
                        "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,4", "GNU.sparse.name": "big.png"}  # fmt: skip
    path = shard(tmp_path / "x.tar", (info, b"1234"), (member("a.png"), png()), (member("a.cls"), b"3"))
    (found,) = tar.index([path], "shard")
    assert list(found.names) == ["a.png"] and found.labels.tolist() == [3] and found.truncated == ""


@pytest.mark.parametrize("count", [40, exhaustive(2000)])
def test_a_shard_of_mutants(tmp_path, count):
    """Whatever is wrong with a tar's bytes: an index of readable ranges, or one sentence."""
    good = [(member(f"{i}.{end}"), data) for i in range(3) for end, data in (("png", png()), ("cls", b"1"))]
    whole = shard(tmp_path / "whole.tar", *good).read_bytes()
    chance = random.Random(5)
    path = tmp_path / "x.tar"
    for _ in range(count):
        path.write_bytes(mutate_bytes(whole, chance))
        (tmp_path / ".x.tar.index.npz").unlink(missing_ok=True)
        try:
            (found,) = tar.index([path], "shard")
        except UserError:
            continue
        files, size = tar.Members.concatenated([(path, found)]), path.stat().st_size
        assert all(o >= 0 and o + s <= size for o, s in zip(found.offsets.tolist(), found.sizes.tolist()))
        for i in range(len(files)):
            files.read(i)


def test_an_index_of_another(tmp_path):
    """A .npz beside a tar whose offsets lie outside of it, or that is a pickle, is made anew."""
    path = shard(tmp_path / "x.tar", (member("a.png"), png()), (member("a.cls"), b"1"))
    (right,) = tar.index([path], "shard")
    file = tmp_path / ".x.tar.index.npz"
    kept = dict(np.load(file))
    mark = tmp_path / "went off"
    for change in (
        dict(sizes=np.array([1 << 40])), dict(offsets=np.array([-1])), dict(labels=np.array([1, 2])),
        dict(offsets=np.array([Bomb(mark)], object)),
    ):  # fmt: skip
        np.savez(file, **kept | change)
        (again,) = tar.index([path], "shard")
        assert again.offsets.tolist() == right.offsets.tolist() and again.sizes.tolist() == right.sizes.tolist()
    assert not mark.exists()


# Images -----------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")


def originals() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    smooth = Image.fromarray(pixels).resize((48, 40))
    files = []
    for kind in FORMATS:
        for image, options in (
            (smooth, dict(progressive=True) if kind == "JPEG" else {}),
            (smooth.convert("L"), dict(compression="tiff_lzw") if kind == "TIFF" else {}),
            (smooth.convert("P" if kind in ("PNG", "GIF", "TIFF") else "RGB"), {}),
        ):
            file = io.BytesIO()
            image.save(file, kind, **options)
            files.append(file.getvalue())
    return files


class Mutants:
    """Files in memory (see saccade.train.data.images.Files)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.originals = count, seed, originals()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"mutant {index}"

    base = name

    def read(self, index: int) -> bytes:
        chance = random.Random(f"{self.seed} {index}")
        return mutate_bytes(self.originals[index % len(self.originals)], chance)


def memory() -> int:
    """The most bytes that an ended child process held."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
@pytest.mark.parametrize("count", [300, exhaustive(6000)])
@pytest.mark.parametrize("training", [False, True])
def test_image_mutants(tmp_path, count, training):
    """Through a loader with workers: each is an image or a bad image; no worker dies, hangs or takes much memory."""
    files = Mutants(count, seed=int(training))
    inputs = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    tested = create_transform(**inputs)
    transform = Augment(decode, **inputs) if training else lambda data, name: tested(decode(data, name))
    dataset = Images(files, np.zeros(count, np.int64), {0: transform}, (0.5,) * 3, (0.5,) * 3)
    order = TrainingOrder(count, 20, 0, 0, count // 20) if training else EvaluationOrder(count, 20)
    bad = BadImages(tmp_path / "bad.txt", None)
    loader = batches(dataset, order, 0, 2, torch.device("cpu"), bad)
    loader.loader.timeout = 60
    seen = sum(len(images) for images, _ in loader)
    refused = len(bad.new)
    assert seen == count if training else seen + refused == count
    assert count // 20 < refused < count
    assert memory() < 4 << 30
    assert all(re.match(r"(can't be read as an image|has )", reason) for reason, _ in bad.new.values())


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    row = bytes(side // 8 + 1)
    pixels = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    ihdr = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_decompression_bombs():
    """A few kilobytes that claim gigabytes are refused before they are decoded."""
    png_bomb = bomb_png(20_000)
    assert len(png_bomb) < 100_000
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "JPEG")
    jpeg = bytearray(small.getvalue())
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    assert _read_header(bytes(jpeg))[0] == 65000**2 and _read_header(small.getvalue())[0] == 64 * 64
    assert _jpeg(bytes(jpeg)) is None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png_bomb, bytes(jpeg)):
        with pytest.raises(BadImage, match=r"bomb can't be read as an image \(Image size \(\d+ pixels\) exceeds limit"):
            decode(data, lambda: "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 999, b"\xff\xd8\xff\xc0\x00\x00"])
def test_jpeg_headers(data):
    assert _read_header(data) == (0, False)


# Tables and lists ---------------------------------------------------------------------------------------------------


def only_user_errors(call, *arguments) -> bool:
    """Whether a reader accepted a file; anything but a UserError of one line is a failure."""
    try:
        call(*arguments)
    except UserError as error:
        assert "\n" not in str(error), error
        return False
    return True


COUNTS = [60, exhaustive(3000)]


def written(path: Path, value, chance: random.Random) -> Path:
    """Write a mutant of a JSON value: of its structure or of its bytes."""
    if chance.random() < 0.7:
        path.write_text(json.dumps(mutate_json(value, chance)), errors="surrogatepass")
    else:
        path.write_bytes(mutate_bytes(json.dumps(value).encode(), chance))
    return path


@pytest.mark.parametrize("count", COUNTS)
def test_coco_mutants(tmp_path, scenes, count):
    value = json.loads(next((scenes / "coco").rglob("*val*.json")).read_text())
    value["annotations"] = value["annotations"][:3]
    chance = random.Random(1)
    accepted = [only_user_errors(coco_json.read, written(tmp_path / "a.json", value, chance)) for _ in range(count)]
    assert not all(accepted)


@pytest.mark.parametrize("count", COUNTS)
def test_index_class_map_and_config_mutants(tmp_path, count):
    chance = random.Random(2)
    index = dict(classes=["a", "b"], shards={"x-0.tar": dict(samples=3, bytes=99, sha256="0")}, plans={})
    described = dict(architecture="test_resnet", label_names=["a", "b"], num_classes=2, data_config=dict(scale=[4, 4]))
    for _ in range(count):
        only_user_errors(read_index, written(tmp_path / "index.json", index, chance))
        only_user_errors(read_class_map, written(tmp_path / "map.json", {"a": "b", "c": "d"}, chance))
        file = written(tmp_path / "config.json", described, chance)
        if only_user_errors(label_names, tmp_path):
            assert all(isinstance(name, str) for name in label_names(tmp_path)), file.read_text()
        names = class_names_of_run(tmp_path)
        assert names is None or all(isinstance(name, str) for name in names)


@pytest.mark.parametrize("task", ["classifier", "detector", "segmenter"])
@pytest.mark.parametrize("count", [4, exhaustive(300)])
def test_config_json_of_a_run(tmp_path, request, task, count):
    """What a run's config.json says is data: whatever it is, the run predicts or is refused in one sentence."""
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(f"{task}_run"), run)
    value, chance = json.loads((run / "config.json").read_text()), random.Random(3)
    for _ in range(count):
        written(run / "config.json", value, chance)
        only_user_errors(predictor, run, "cpu")


@pytest.mark.parametrize("count", COUNTS)
def test_class_lists_and_label_maps(tmp_path, count):
    chance = random.Random(4)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).resize((4, 4), 0).save(tmp_path / f"labels/{i}.png")
    names, label = b"road\nsky\n", (tmp_path / "labels/0.png").read_bytes()
    inputs = dict(mean=(0.5,) * 3, std=(1,) * 3)

    def read() -> None:
        Folders(str(tmp_path), shares=(0, 0), scale=None).dataset("train", inputs)

    for i in range(count):
        (tmp_path / "classes.txt").write_bytes(mutate_bytes(names, chance) if i % 2 else names)
        (tmp_path / "labels/0.png").write_bytes(label if i % 2 else mutate_bytes(label, chance))
        only_user_errors(read)


@pytest.mark.parametrize("count", COUNTS)
def test_nuscenes_mutants(tmp_path, count):
    from saccade.train.data.bev_scenes import BevScenes, write_nuscenes

    write_nuscenes(tmp_path / "made", BevScenes(img_size=(8, 12), most=2), frames=1)
    tables = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "made/v1.0-mini").glob("*.json")}
    chance = random.Random(6)
    for _ in range(count):
        name = chance.choice([name for name in sorted(tables) if tables[name]])
        changed = mutate_json(tables[name], chance)
        only_user_errors(check_tables, tables | {name: changed}, tmp_path)
