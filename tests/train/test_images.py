"""Images of every kind that files hold: one rule for 16 bits and floats, frames, palettes, orientation."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.data.augment import _jpeg
from saccade.train.data.bad_images import BadImage
from saccade.train.data.folder import ImageFolder
from saccade.train.data.images import decode, read_image, stored_size
from saccade.train.tasks.classify import ClassPredictor
from saccade.train.tasks.detect import DetectionPredictor
from saccade.train.tasks.segment import MapPredictor
from torchvision.transforms.functional import pil_to_tensor

RAMP = np.linspace(0, 65535, 4096).reshape(64, 64)
EIGHT = np.round(np.round(RAMP) / 257).astype(np.uint8)


@pytest.mark.parametrize("name", ["u16.png", "u16.tif", "u16.pgm", "f32.tif"])
def test_sixteen_bits_and_floats_keep_their_values(tmp_path, name):
    pixels = np.float32(RAMP / 65535) if name[0] == "f" else np.round(RAMP).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / name)
    seen = np.array(read_image(tmp_path / name))
    assert seen.shape == (64, 64, 3) and (seen == seen[..., :1]).all()
    assert np.abs(seen[..., 0].astype(int) - EIGHT).max() <= (name[0] == "f")


@pytest.mark.parametrize("values", [[[0, 70000]], [[-5, 5]], [[0, 255]]])
def test_whole_numbers_of_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(np.array(values, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=r"a\.tif has 32-bit integers, whose range is unknown"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("values", [[[0, 255.0]], [[-0.5, 1]], [[0, np.nan]], [[0, np.inf]]])
def test_floats_out_of_range_are_refused(tmp_path, values):
    Image.fromarray(np.array(values, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=r"a\.tif has floats from .*, which must be from 0 to 1"):
        read_image(tmp_path / "a.tif")


def test_other_modes(tmp_path):
    """Palettes, one bit, grey with transparency, CMYK, colours with transparency; the first of several frames."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    kinds = {
        "p.png": (palette, [[1, 2, 3], [200, 100, 50]]),
        "1.png": (Image.fromarray(np.array([[True, False]])), [[255] * 3, [0] * 3]),
        "la.png": (Image.merge("LA", [Image.new("L", (2, 1), 7), Image.new("L", (2, 1), 0)]), [[7] * 3] * 2),
        "rgba.png": (Image.new("RGBA", (2, 1), (9, 8, 7, 0)), [[9, 8, 7]] * 2),
        "cmyk.tif": (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), [[255, 0, 0]] * 2),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name)
        assert np.array(read_image(tmp_path / name)).tolist() == [expected]
    frames = [Image.new("RGB", (2, 1), (255 * (i == 0), 255 * (i == 1), 0)) for i in range(3)]
    for name in ("a.gif", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.array(read_image(tmp_path / name)).tolist() == [[[255, 0, 0]] * 2]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])  # of phones
    assert np.array(read_image(tmp_path / "a.jpg")).tolist() == [[[254, 0, 0]] * 2]
    kinds["cmyk.tif"][0].save(tmp_path / "cmyk.jpg", quality=100)
    assert np.array(read_image(tmp_path / "cmyk.jpg")).tolist() == [[[255, 0, 0]] * 2]
    palette.save(tmp_path / "p.png", transparency=bytes([0, 9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array(read_image(tmp_path / "p.png")).tolist() == [kinds["p.png"][1]]
    large = Image.Exif()
    large[0x0112], large[0x927C] = 6, bytes(60000)  # a quarter turn, and a camera's own notes
    frames[0].save(tmp_path / "a.jpg", exif=large)
    assert read_image(tmp_path / "a.jpg").size == (1, 2)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, kind, orientation):
    """As ImageOps.exif_transpose has it; what training decodes by another way is the same."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = (250, 10, 10)
    pixels[8:, :16] = (10, 250, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{kind}"
    Image.fromarray(pixels).save(file, exif=exif)
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    seen = np.array(read_image(file)).astype(int)
    assert seen.shape == upright.shape and np.abs(seen[4::8, 4::8] - upright[4::8, 4::8]).max() < 40
    size, turn = stored_size(file)
    assert (size if turn is None else Image.new("L", size).transpose(turn).size) == seen.shape[1::-1]
    if kind == "jpg":
        fast = _jpeg(file.read_bytes()).permute(1, 2, 0).numpy().astype(int)
        assert fast.shape == seen.shape and np.abs(fast - seen).max() < 40


def test_rules_that_apply_are_reported_once(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.round(RAMP).astype(np.uint16)).save(tmp_path / name / f"{i}.png")
    inputs = dict(input_size=(3, 8, 8), interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0)
    data = ImageFolder(str(tmp_path), shares=(0, 0))
    image, _ = data.dataset("train", inputs)[0]
    assert 0.4 < image.mean() < 0.6
    assert capsys.readouterr().out.count("6 of 6 train images have 16 bits per pixel, which are divided by 257\n") == 1


def test_damaged_files_are_bad_images():
    file = io.BytesIO()
    Image.fromarray(np.round(RAMP).astype(np.uint16)).save(file, "PNG")
    for data in (b"", b"nothing", file.getvalue()[:200]):
        with pytest.raises(BadImage, match="it can't be read as an image"):
            decode(data, lambda: "it")


@pytest.mark.parametrize("predictor", [ClassPredictor, DetectionPredictor, MapPredictor])
def test_predictors_convert_images_as_files_are(predictor):
    """An image given in code, here of 16 bits, reaches the model with the values that its file would have."""
    given = []

    class Stopped(Exception):
        pass

    def model(images):
        given.extend(images)
        raise Stopped

    object_ = predictor.__new__(predictor)
    object_.model, object_.transform, object_.device = model, pil_to_tensor, torch.device("cpu")
    with pytest.raises(Stopped):
        object_.predict([Image.fromarray(np.full((2, 3), 257 * 51, np.uint16))])
    assert given[0].shape == (3, 2, 3) and set((given[0].float() / given[0].max()).unique().tolist()) == {1.0}
    assert given[0].max().item() in (51, pytest.approx(51 / 255))
    with pytest.raises(BadImage, match="32-bit integers"):
        object_.predict([Image.fromarray(np.full((2, 3), 70000, np.int32))])
