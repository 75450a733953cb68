"""Folders as people have them: what is read, what is skipped, and what is reported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saccade.train.data.ade20k import Folders
from saccade.train.data.coco import Coco
from saccade.train.data.files import Skipped, image_files, refuse_data_folder, split_of
from saccade.train.data.folder import ImageFolder
from saccade.train.data.imagenet import ImageNet
from saccade.train.runtime.errors import UserError
from saccade.train.runtime.run_folder import HEADER

INPUTS = dict(mean=(0.5,) * 3, std=(1,) * 3)


def image(path: Path, value: int = 0, size=(4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def pets(tmp_path):
    for name in ("cat", "dog"):
        for i in range(4):
            image(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def used(data: ImageFolder) -> set[str]:
    return {path for samples in data._splits.values() for path, _ in samples}


def test_hidden_and_system_folders_are_passed_over(pets, capsys):
    before = used(ImageFolder(str(pets)))
    for name in ("cat/.ipynb_checkpoints", "cat/__MACOSX", "dog/@eaDir", "__MACOSX/cat", ".thumbnails", "dog/.cache"):
        image(pets / name / "1.png")
    image(pets / "cat/._1.png")
    (pets / "cat/Thumbs.db").touch()
    data = ImageFolder(str(pets))
    assert used(data) == before and data.class_names == ["cat", "dog"]
    assert f"data: skipped in {pets}: 6 hidden\n" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["pdf", "h5", "mpg", "ps", "eps", "txt", "mp4", "HEIC", ""])
def test_files_that_are_no_images_are_counted(pets, ending, capsys):
    (pets / f"cat/a.{ending}".rstrip(".")).write_text("notes")
    assert len(used(ImageFolder(str(pets)))) == 8
    out = capsys.readouterr().out
    assert f"1 {'.' + ending.lower() if ending else 'without extension'}\n" in out
    assert ("skipped 1 HEIC file, which Pillow can't read here: convert to JPEG" in out) == (ending == "HEIC")


def test_links_are_followed_once(pets, tmp_path, capsys):
    """Upwards, to itself, to another class, and to folders elsewhere, which are data."""
    image(tmp_path / "elsewhere/7.png")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    for name, target in (("up", pets), ("far", tmp_path), ("self", pets / "cat"), ("other", pets / "dog")):
        (pets / "cat" / name).symlink_to(target)
    (pets / "dog/more").symlink_to(tmp_path / "elsewhere")
    (pets / "all").symlink_to(pets)
    data = ImageFolder(str(pets))
    assert data.class_names == ["cat", "dog"] and len(used(data)) == 9
    assert capsys.readouterr().out.count("skipped link to a folder") == 6
    (pets / "puppy").symlink_to(pets / "dog")
    with pytest.raises(UserError, match=r"class folders .*dog and .*puppy are the same, by a link"):
        ImageFolder(str(pets))


def test_folders_of_runs_are_no_classes(pets, capsys):
    for run in ("run", "runs/a", "cat/run"):
        image(pets / run / "pictures/batch.png")
        (pets / run / "config.py").write_text(HEADER)
    data = ImageFolder(str(pets))
    assert data.class_names == ["cat", "dog"] and len(used(data)) == 8
    assert capsys.readouterr().out.count("skipped run folder") == 3
    refuse_data_folder(pets / "run", dict(type=ImageFolder, root=str(pets)))  # to resume it
    refuse_data_folder(pets.parent / "pets_run", dict(type=ImageFolder, root=str(pets)))


@pytest.mark.parametrize("kind", [ImageFolder, ImageNet])
def test_no_run_is_written_among_the_images(tmp_path, pets, kind):
    data = dict(type=kind, root=str(pets))
    for run in (pets / "new", pets / "runs/new", pets / "cat"):
        with pytest.raises(UserError, match=r"--run-dir .* is inside .*pets, whose images are all data: choose"):
            refuse_data_folder(run, data)
    for split in ("train", "val"):
        image(tmp_path / f"split/{split}/cat/0.png")
    data = dict(type=kind, root=str(tmp_path / "split"))
    refuse_data_folder(tmp_path / "split/run", data)  # which is neither split
    with pytest.raises(UserError, match=r"is inside .*split/val, whose"):
        refuse_data_folder(tmp_path / "split/val/run", data)
    maps = dict(type=Folders, root=str(tmp_path), labels="masks")
    refuse_data_folder(tmp_path / "run", maps)
    with pytest.raises(UserError, match=r"is inside .*masks, whose"):
        refuse_data_folder(tmp_path / "masks/run", maps)
    refuse_data_folder(pets / "run", dict(type=Coco, root=str(pets)))  # its json lists the images


@pytest.mark.parametrize(
    "names",
    ["train val test", "Training Validation Testing", "TRAIN valid Test", "train_set dev_set test_set", "Training dev"],
)
def test_split_folders_by_any_name(tmp_path, names):
    for split, name in zip(("train", "val", "test"), names.split()):
        for kind in ("cat", "dog"):
            image(tmp_path / "pets" / name / kind / f"{split}.png")
        image(tmp_path / "maps/images" / name / "a.png")
        save_labels(tmp_path / "maps/labels" / name / "a.png", [[0, 1]], image_size=None)
    data = ImageFolder(str(tmp_path / "pets"))
    assert data.class_names == ["cat", "dog"]
    maps = Folders(str(tmp_path / "maps"), classes=["a", "b"])
    for split in ("train", "val", "test"):
        expected = split if split != "test" or "est" in names else "val"
        assert {Path(path).stem for path, _ in data._splits[split]} == {expected}
        folder = names.split()[("train", "val", "test").index(expected)]
        assert [Path(path).parent.name for path in maps.pairs(split)[0]] == [folder]
    assert len(ImageFolder.scanned(str(tmp_path / "pets"))) == len(names.split())


def test_splits_that_are_not_understood(tmp_path, pets):
    for name in ("a", "b"):
        image(tmp_path / f"two/Training/{name}/0.png")
        image(tmp_path / f"two/Testing/{name}/0.png")
    with pytest.raises(UserError, match=r"two has Training but no val: add .*two/val, or give .*two/Training itself"):
        ImageFolder(str(tmp_path / "two"))
    image(tmp_path / "two/valid/a/0.png")
    image(tmp_path / "two/validation/a/0.png")
    with pytest.raises(UserError, match=r"two/valid and .*two/validation are both val splits: leave one"):
        ImageFolder(str(tmp_path / "two"))
    for name in ("train", "test"):
        image(tmp_path / "flat" / name / "0.png")
    with pytest.raises(UserError, match=r"flat has train but no val"):
        ImageFolder(str(tmp_path / "flat"))
    for name in ("val", "test"):
        image(tmp_path / "late" / name / "a/0.png")
    with pytest.raises(UserError, match="late has test and val but no train: add it"):
        ImageFolder(str(tmp_path / "late"))
    image(pets / "train/0.png")  # the vehicle
    assert ImageFolder(str(pets)).class_names == ["cat", "dog", "train"]


def test_layouts_of_imagenet(tmp_path, capsys):
    """A test folder without labels is not used; what lies flat, one folder deeper or in tars is explained."""
    root = tmp_path / "CLS-LOC"
    for split in ("train", "val"):
        for kind in ("n01440764", "n01443537"):
            image(root / split / kind / f"{split}.JPEG")
    image(root / "test/ILSVRC2012_test_00000001.JPEG")
    data = ImageFolder(str(root))
    assert {Path(path).stem for path, _ in data._splits["test"]} == {"val"}
    assert f"{root}/test holds images without class folders: tests use val instead" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"one class only, CLS-LOC: .*, or data\.root=.*/CLS-LOC if that contains"):
        ImageFolder(str(tmp_path))
    shutil.rmtree(root / "val")
    image(root / "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"val holds no class folders, but 1 images: .* as valprep\.sh does"):
        ImageFolder(str(root))
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train/n01440764.tar").touch()
    with pytest.raises(UserError, match="train holds no class folders, but 1 tar files: unpack each into a folder"):
        ImageFolder(str(root))


def test_links_from_val_to_train(tmp_path):
    for kind in ("cat", "dog"):
        image(tmp_path / "pets/train" / kind / "0.png")
    for name in ("val", "Testing"):
        link = tmp_path / "pets" / name
        link.symlink_to(tmp_path / "pets/train")
        with pytest.raises(
            UserError, match=rf"{name} and .*train are the same folder, by a link: give (val|test) its own"
        ):
            ImageFolder(str(tmp_path / "pets"))
        link.unlink()
        image(tmp_path / "pets/val/cat/0.png")


def test_class_names_that_look_alike(tmp_path, pets, capsys):
    """Names that differ in letter case, white space or Unicode form: two classes, and reported; in val, named."""
    for name in ("Dog", "cafe\u0301", "caf\u00e9", "hot dog", "7", "10"):
        for i in range(3):
            image(pets / name / f"{i}.png")
    data = ImageFolder(str(pets), img_size=8)
    assert data.class_names == ["10", "7", "Dog", "cafe\u0301", "caf\u00e9", "cat", "dog", "hot dog"]
    data.dataset("train", dict(input_size=(3, 8, 8), **INPUTS))
    out = capsys.readouterr().out
    assert "data: classes whose names look alike: 'Dog', 'dog'; are they one class?\n" in out
    assert out.count("look alike") == 2
    for path in ("train/cat/0.png", "train/dog/0.png", "val/cat /0.png"):
        image(tmp_path / "split" / path)
    with pytest.raises(UserError, match=r"val/cat  is a class that .*train does not have: rename it as 'cat' there"):
        ImageFolder(str(tmp_path / "split"))


def test_names_of_splits():
    assert [split_of(name) for name in ("Train", "valid-set", "test_images", "trained", "devices", "validation")] == [
        "train", "val", "test", None, None, "val",
    ]  # fmt: skip


def test_a_class_without_images_is_reported(pets, capsys):
    ImageFolder(str(pets), img_size=8).dataset("train", dict(input_size=(3, 8, 8), **INPUTS))
    assert "data: train: 6 images, cat 50 %, dog 50 %\n" in capsys.readouterr().out


def save_labels(path: Path, labels, image_size=(2, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)
    if image_size:
        image(Path(str(path).replace("labels", "images")), size=image_size)


def folders(root: Path, labels, **arguments):
    for i in range(4):
        save_labels(root / f"labels/{i}.png", labels)
    return Folders(str(root), **dict(classes=["background", "object"], shares=(0.25, 0.25), scale=None) | arguments)


@pytest.mark.parametrize(
    "labels, ignored, sentence",
    [
        (
            [[0, 255]],
            False,
            r"pixels of only one class, background, and none of object: .* \(50 % of the pixels are ignored",
        ),
        ([[255, 255]], False, r"no pixels of any class: there is nothing to learn \(100 % of the pixels are ignored"),
        ([[0, 255]], True, "no pixels of any class"),
        ([[1, 1]], False, "pixels of only one class, object, and none of background"),
    ],
)
def test_label_maps_with_nothing_to_learn(tmp_path, labels, ignored, sentence, capsys):
    source = folders(tmp_path, labels, zero_ignored=ignored)
    with pytest.raises(UserError, match=sentence):
        source.dataset("train", INPUTS, training=True)
    source.dataset("val", INPUTS)  # it is tested on all the same
    assert "val has no pixels of " in capsys.readouterr().out


def test_shares_of_label_maps(tmp_path, capsys):
    source = folders(tmp_path, [[0, 1]])
    source.dataset("train", INPUTS, training=True)
    assert "data: train: 4 pixels, background 50 %, object 50 %\n" in capsys.readouterr().out
    source = folders(tmp_path / "late", [[0, 0]], shares=(0, 0), check=1)
    save_labels(tmp_path / "late/labels/3.png", [[1, 1]])  # the last one that is looked at
    source.dataset("train", INPUTS, training=True)
    assert "data: train: 8 pixels, background 75 %, object 25 %\n" in capsys.readouterr().out


def test_class_lists(tmp_path):
    """A byte-order mark, line ends of Windows; empty and double names, other encodings."""
    (tmp_path / "classes.txt").write_bytes("\ufeffroad\r\nwörld\r\n\r\n".encode())
    assert Folders(str(tmp_path)).class_names == ["road", "wörld"]
    for text, sentence in (
        ("a\n\nb", r"classes\.txt, line 2 is empty: name that class"),
        ("a\nb\na", r"classes\.txt, line 3 is 'a', like 1: give each class a unique name"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=sentence):
            Folders(str(tmp_path))
    (tmp_path / "classes.txt").write_bytes("wörld\nb".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt is not UTF-8 text \(byte 1\): save it as UTF-8"):
        Folders(str(tmp_path))


def test_one_name_with_two_endings(tmp_path):
    source = folders(tmp_path, [[0, 1]])
    image(tmp_path / "images/0.bmp")
    with pytest.raises(UserError, match=r"images/0\.bmp and .*images/0\.png differ only in their extension"):
        source.pairs("train")


def test_label_maps_of_every_kind(tmp_path):
    """Grey saved in three channels, palettes, with transparency, of 1 and of 16 bits; what can't be one is refused."""
    labels = np.array([[0, 1]], np.uint8)
    save_labels(tmp_path / "labels/a.png", labels)
    source = Folders(str(tmp_path), classes=["a", "b"], shares=(0, 0), scale=None)
    grey = Image.fromarray(labels)
    palette = grey.convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    kinds = dict(RGB=grey.convert("RGB"), RGBA=grey.convert("RGBA"), LA=grey.convert("LA"), P=palette)
    kinds |= {"1": Image.fromarray(labels.astype(bool)), "I;16": Image.fromarray(labels.astype(np.uint16))}
    for mode, kind in kinds.items():
        assert kind.mode == mode
        kind.save(tmp_path / "labels/a.png")
        assert source.dataset("train", INPUTS)[0][1].tolist() == [[0, 1]]
    for kind, name, sentence in (
        (palette.convert("RGB"), "a.png", r"got colours \(RGB\): save the class numbers"),
        (Image.fromarray(np.float32(labels)), "a.tif", "has float values"),
        (grey, "a.jpg", "is a JPEG file, which is lossy: save it as PNG"),
    ):
        for old in (tmp_path / "labels").iterdir():
            old.unlink()
        kind.save(tmp_path / "labels" / name)
        with pytest.raises(UserError, match=sentence):
            Folders(str(tmp_path), classes=["a", "b"], shares=(0, 0), scale=None).dataset("train", INPUTS)


def turned(pixels: np.ndarray, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)


def test_label_maps_of_turned_images(tmp_path):
    """EXIF orientation 6 (a quarter turn): the label map was drawn on the upright image, or on the stored one."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    upright = np.rot90(stored, -1)
    turned(np.repeat(stored[..., None], 3, 2), tmp_path / "images/a.png", 6)
    for labels in (upright % 2, stored % 2):
        save_labels(tmp_path / "labels/a.png", labels, image_size=None)
        source = Folders(str(tmp_path), classes=["a", "b"], shares=(0, 0), scale=None)
        pixels, seen, _ = source.dataset("train", INPUTS)[0]
        assert np.array_equal(pixels[0], upright) and np.array_equal(seen, upright % 2)
    turned(stored % 2, tmp_path / "labels/a.png", 6)
    assert np.array_equal(source.dataset("train", INPUTS)[0][1], upright % 2)
    save_labels(tmp_path / "labels/a.png", np.zeros((5, 5)), image_size=None)
    with pytest.raises(UserError, match=r"is 5x5 pixels, its image .* is 3x2 \(by its EXIF orientation\)"):
        source.dataset("train", INPUTS)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match="can't be read \\(Permission denied\\)"):
        image_files(tmp_path, Skipped())
