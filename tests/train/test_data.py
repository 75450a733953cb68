"""Digits, and folders of images as people have them."""

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.data.digits import Digits
from saccade.train.data.folder import ImageFolder
from saccade.train.runtime.errors import UserError
from torchvision.transforms import InterpolationMode

INPUTS = dict(input_size=(3, 16, 16), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


def picture(path, colour=(10, 200, 30), mode="RGB", size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def pets(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png")
    return tmp_path


def test_digits_split():
    digits = Digits(img_size=32)
    parts = {part: digits.dataset(part, digits.inputs({})) for part in ("train", "val", "test")}
    assert {part: len(images) for part, images in parts.items()} == dict(train=1257, val=180, test=360)
    for images in parts.values():
        shares = np.bincount([label for _, label in images]) / len(images)
        assert len(shares) == 10 and abs(shares - 0.1).max() < 0.01
    indices = [set(digits._splits[part].tolist()) for part in parts]
    assert len(set.union(*indices)) == sum(map(len, indices)) == 1797


@pytest.mark.parametrize("size", [8, 32, 45])
def test_digits_images(size):
    digits = Digits(img_size=size, shift=0.0)
    image, label = digits.dataset("val", digits.inputs({}), training=True)[0]
    assert image.shape == (3, size, size) and image.dtype == torch.float32 and isinstance(label, int)
    grey = image[0] * 0.35 + 0.3
    assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6 and grey.max() > 0.8


def test_digits_shift():
    digits = Digits(img_size=32, shift=1.0)
    still, moving = (digits.dataset("train", digits.inputs({}), training) for training in (False, True))
    torch.manual_seed(0)
    black = -0.3 / 0.35
    padded = torch.nn.functional.pad(still[0][0], [4] * 4, value=black)
    seen = set()
    for _ in range(30):
        image = moving[0][0]
        places = [(y, x) for y in range(9) for x in range(9) if padded[:, y : y + 32, x : x + 32].allclose(image)]
        assert places
        seen.add(places[0])
    assert len(seen) > 15


def test_folder_is_divided(pets):
    data = ImageFolder(str(pets), img_size=16)
    assert data.class_names == ["cat", "dog"]
    sizes = {part: len(data.dataset(part, INPUTS)) for part in ("train", "val", "test")}
    assert sizes == dict(train=14, val=2, test=4)
    files = [path for samples in data._splits.values() for path, _ in samples]
    assert len(set(files)) == 20
    again = ImageFolder(str(pets), img_size=16)
    assert again._splits == data._splits


def test_split_folders(tmp_path):
    for part in ("train", "val"):
        for name in ("b", "a"):
            for i in range(3):
                picture(tmp_path / part / name / f"{i}.jpg")
    data = ImageFolder(str(tmp_path))
    assert data.class_names == ["a", "b"] and len(data.dataset("train", INPUTS)) == 6
    assert data._splits["test"] == data._splits["val"]
    picture(tmp_path / "test" / "a" / "0.jpg")
    assert len(ImageFolder(str(tmp_path)).dataset("test", INPUTS)) == 1


def test_untidy_folders(tmp_path):
    """Nested folders, odd extensions and modes, hidden and foreign files."""
    for i, (name, mode) in enumerate([("x.JPG", "L"), ("deep/er/y.webp", "RGB"), ("z.tiff", "CMYK"), ("w.gif", "P")]):
        picture(tmp_path / "a" / name, (50 * i, 0, 0), mode)
        picture(tmp_path / "b" / f"{i}.png", (0, 0, 0, 0), "RGBA")
    for junk in ("a/notes.txt", "a/.hidden.png", ".git/c.png", "Thumbs.db"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_text("")
    data = ImageFolder(str(tmp_path), img_size=16, shares=(0.0, 0.25))
    images = data.dataset("train", INPUTS)
    assert data.class_names == ["a", "b"] and len(images) == 6
    for image, _ in images:
        assert image.shape == (3, 16, 16) and image.isfinite().all()


def test_training_augments_and_evaluation_does_not(pets):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for path in pets.glob("*/*.png"):
        Image.fromarray(noise).save(path)
    data = ImageFolder(str(pets), img_size=16, augment=dict(hflip=1.0, color_jitter=0.4))
    moving, still = data.dataset("train", INPUTS, training=True), data.dataset("train", INPUTS)
    assert not torch.equal(moving[0][0], moving[0][0])
    assert torch.equal(still[0][0], still[0][0])


def test_interpolation_of_training(pets):
    """data.augment's is for training crops alone; evaluation keeps the model's."""
    inputs = INPUTS | dict(interpolation="bicubic")
    data = ImageFolder(str(pets), augment=dict(interpolation="random"))
    crop = data.dataset("train", inputs, training=True).transform.on_tensors[0]
    assert crop.interpolation == (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    resize = data.dataset("val", inputs).transform.args[0].transforms[0]
    assert resize.interpolation == InterpolationMode.BICUBIC
    with pytest.raises(UserError, match=r"interpolation='cubic' must be one of random, nearest, bilinear"):
        ImageFolder(str(pets), augment=dict(interpolation="cubic"))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original"])
def test_posterising_to_nothing(pets, policy):
    """At magnitude 10 no bits are left and the image is black, whatever Pillow thinks of it."""
    images = ImageFolder(str(pets), augment=dict(auto_augment=policy)).dataset("train", INPUTS, training=True)
    step = images.transform.on_pil.transforms[0]
    ops = [*getattr(step, "ops", ()), *(op for pair in getattr(step, "policy", ()) for op in pair)]
    posterising = [op for op in ops if "Posterize" in op.name]
    assert posterising
    image = Image.new("RGB", (4, 4), (255, 200, 1))
    for op in posterising:
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0.0
        assert op(image).getpixel((0, 0)) == ((255, 200, 1) if policy == "original" else (0, 0, 0))


def test_preprocessing_is_the_models(pets):
    cfg = dict(input_size=(3, 64, 64), mean=(0.1,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=0.8)
    inputs = ImageFolder(str(pets)).inputs(cfg)
    assert {k: inputs[k] for k in cfg} == cfg
    assert ImageFolder(str(pets), img_size=32).inputs(cfg)["input_size"] == (3, 32, 32)


def test_unreadable_image(pets):
    for path in pets.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:40])
    images = ImageFolder(str(pets)).dataset("train", INPUTS)
    with pytest.raises(UserError, match=r"cat/\d\.png can't be read as an image .*: repair or remove it"):
        images[0]


def empty(folder):
    (folder / "cow").mkdir()


def foreign(folder):
    (folder / "cow").mkdir()
    (folder / "cow" / "a.mp4").touch()


def no_val(folder):
    picture(folder / "train" / "a" / "0.png")


def new_class(folder):
    for name in ("train/a", "train/b", "val/a", "val/c"):
        picture(folder / name / "0.png")


def one_class(folder):
    for path in (folder / "dog").iterdir():
        path.unlink()
    (folder / "dog").rmdir()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (empty, r"class folder .*cow holds no images: add some or remove the folder"),
        (foreign, r"class folder .*cow holds no images \(only files with extension \.mp4\)"),
        (no_val, r"has train but no val"),
        (new_class, r"val/c is a class that .*train does not have"),
        (one_class, r"holds one class only, cat"),
    ],
)
def test_nothing_to_learn_from(pets, change, sentence):
    change(pets)
    with pytest.raises(UserError, match=sentence):
        ImageFolder(str(pets))


def test_roots(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*nowhere is not a folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no class folders"):
        ImageFolder(str(tmp_path))


def test_arguments(pets):
    with pytest.raises(UserError, match=r"unknown key data\.augment\.hflop, did you mean hflip"):
        ImageFolder(str(pets), augment=dict(hflop=1.0))
    with pytest.raises(UserError, match=r"data\.shares=\(0\.5, 0\.5\)"):
        ImageFolder(str(pets), shares=(0.5, 0.5))
    with pytest.raises(UserError, match="the val split is empty"):
        ImageFolder(str(pets), shares=(0.0, 0.2)).dataset("val", INPUTS)
