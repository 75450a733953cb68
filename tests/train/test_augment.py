"""timm's training transform begun on tensors: timm's own crops and flips, and pixels that differ by rounding."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from saccade.train.data import turbojpeg
from saccade.train.data.augment import Augment
from saccade.train.data.bad_images import BadImage
from saccade.train.data.folder import ImageFolder
from saccade.train.data.images import Images, decode
from saccade.train.runtime.errors import UserError
from sklearn.datasets import load_sample_image
from timm.data import create_transform

INPUTS = dict(input_size=(3, 64, 64), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PHOTOGRAPH = Image.fromarray(load_sample_image("flower.jpg")[:300, 100:500])


def file(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    PHOTOGRAPH.convert(mode).save(out, kind)
    return out.getvalue()


def seeded(function, *args) -> list[torch.Tensor]:
    """Twenty images, each of random numbers of its own."""
    images = []
    for i in range(20):
        random.seed(i), np.random.seed(i), torch.manual_seed(i)
        images.append(function(*args))
    return images


def both(data: bytes, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty images of each, in levels of 255 where nothing but pixels were done to."""
    mean, std = (torch.tensor(INPUTS[key]).view(3, 1, 1) for key in ("mean", "std"))
    timms = create_transform(**INPUTS, **arguments, is_training=True)
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.stack(seeded(timms, image.convert("RGB")))
    ours = torch.stack(seeded(Augment(decode, **INPUTS, **arguments), data, lambda: "a file"))
    if ours.dtype == torch.uint8:
        return ours.float(), (expected * std + mean) * 255
    return ours, expected


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "L")]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_and_flips(kind, mode, interpolation):
    ours, timms = both(file(kind, mode), interpolation=interpolation, vflip=0.5, color_jitter=0.0)
    difference = (ours - timms).abs()
    assert difference.max() < 2.01 and difference.mean() < 0.3  # of 255


@pytest.mark.parametrize(
    "arguments",
    [dict(color_jitter=0.4), dict(auto_augment="rand-m5-inc1"), dict(grayscale_prob=0.5)],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_follows_on_pil_images(arguments):
    ours, timms = both(file(), interpolation="bilinear", **arguments)
    difference = (ours - timms).abs().flatten(1)
    # Some of RandAugment's operations (equalising, solarising) make much of a level's difference, in few pixels.
    assert difference.median(1).values.max() < 1.01 and (difference > 8).float().mean() < 0.02


def test_without_a_resized_crop_all_is_timms():
    ours, timms = both(file(), train_crop_mode="rkrr", interpolation="lanczos", color_jitter=0.4)
    assert (ours - timms).abs().max() < 1e-3
    ours, timms = both(file(), interpolation="lanczos", color_jitter=0.0)
    assert (ours - timms).abs().max() < 1e-3


def test_erasing_follows_normalising():
    ours, timms = both(file(), re_prob=1.0, re_mode="const", color_jitter=0.0, interpolation="bilinear")
    assert torch.equal(ours == 0, timms == 0) and (ours == 0).any()
    assert (ours - timms).abs().max() < 2.01 / 255 / 0.224


def test_normalised_where_the_model_is():
    pixels = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    images = Images(None, [], {0: None}, INPUTS["mean"], INPUTS["std"])
    normalised, labels = images.finish([pixels, "labels"])
    decoded = pixels.contiguous(memory_format=torch.channels_last)  # as a loader hands it over
    assert torch.equal(images.finish([decoded])[0], normalised) and images.finish([decoded])[0].is_contiguous()
    plain = create_transform((3, 5, 7), mean=INPUTS["mean"], std=INPUTS["std"], crop_pct=1.0)
    for mine, image in zip(normalised, pixels):
        expected = plain(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        assert torch.allclose(mine, expected, rtol=0, atol=1e-6)
    assert labels == "labels" and images.finish([normalised])[0] is normalised


def test_damaged():
    with pytest.raises(BadImage, match=r"truncated\.jpg"):
        Augment(decode, **INPUTS)(file()[:2000], lambda: "truncated.jpg")


cropping = pytest.mark.skipif(not turbojpeg.is_installed(), reason="libjpeg-turbo 3 is not installed")


def jpeg(size: tuple[int, int] = (400, 300), mode: str = "RGB", **arguments) -> bytes:
    out = io.BytesIO()
    PHOTOGRAPH.convert(mode).resize(size).save(out, "JPEG", **arguments)
    return out.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return jpeg(exif=exif)


FILES = {
    "4:4:4": jpeg(subsampling="4:4:4"),
    "4:2:2, odd size": jpeg((399, 217), subsampling="4:2:2"),
    "4:2:0": jpeg(subsampling="4:2:0"),
    "4:2:0, odd size": jpeg((77, 101), subsampling="4:2:0"),
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_rows=1),
    "greyscale": jpeg(mode="L"),
    "CMYK": jpeg(mode="CMYK"),
    "EXIF, upright": jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "EXIF, turned": turned(),
    "bytes after the end": jpeg() + b"more",
    "PNG": file("PNG"),
}


@cropping
@pytest.mark.parametrize("name", FILES)
def test_cropped_decoding(name, monkeypatch):
    """The same crops of the same pixels, and the same random numbers after them, whether a crop is decoded or all."""
    images, decoded = {}, []
    crop = turbojpeg.Jpeg.crop
    monkeypatch.setattr(turbojpeg.Jpeg, "crop", lambda self, *box: decoded.append(box) or crop(self, *box))
    for how in ("exact", "cropped"):
        step = Augment(decode, how, **INPUTS, color_jitter=0.0, vflip=0.5)
        images[how] = [
            (image, random.random(), np.random.rand(), torch.rand(1))
            for i in range(12)
            for _ in [random.seed(i), np.random.seed(i), torch.manual_seed(i)][:1]
            for image in [step(FILES[name], lambda: name)]
        ]
    for (exact, *after), (cropped, *after_crop) in zip(images["exact"], images["cropped"]):
        assert torch.equal(exact, cropped) and after == after_crop
    whole = name in ("CMYK", "EXIF, turned", "bytes after the end", "PNG")
    assert len(decoded) == (0 if whole else 12)


@cropping
def test_every_edge_of_a_crop():
    """Crops at all offsets within an iMCU equal those of the decoded image, at its borders too."""
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        data = jpeg((67, 51), subsampling=subsampling)
        opened, whole = turbojpeg.Jpeg(data), np.array(Image.open(io.BytesIO(data)))
        assert (opened.height, opened.width) == (51, 67)
        for i in range(36):
            top, left = i, (i * 7) % 60
            height, width = 1 + i * 5 % (51 - top), 1 + i * 11 % (67 - left)
            crop = opened.crop(top, left, height, width)
            assert np.array_equal(crop, whole[top : top + height, left : left + width])


@cropping
def test_damaged_for_cropped_decoding(monkeypatch):
    """A truncated file is refused as ever; one that is damaged above the crop is decoded as a whole, with its crop."""
    data = jpeg(quality=95)
    with pytest.raises(BadImage, match=r"truncated\.jpg"):
        Augment(decode, "cropped", **INPUTS)(data[: len(data) * 9 // 10], lambda: "truncated.jpg")
    with pytest.raises(ValueError, match="damaged"):
        turbojpeg.Jpeg(data[:4000] + data[-2:]).crop(200, 0, 50, 50)
    with pytest.raises(ValueError, match="not a JPEG"):
        turbojpeg.Jpeg(b"no JPEG at all")
    with pytest.raises(ValueError, match="rare"), monkeypatch.context() as patch:
        patch.setattr(turbojpeg, "_IMCU", {})
        turbojpeg.Jpeg(data)
    broken = data[:4000] + data[-2:]
    exact, cropped = (
        torch.stack(seeded(Augment(decode, how, **INPUTS, color_jitter=0.0), broken, lambda: "a file"))
        for how in ("exact", "cropped")
    )
    assert torch.equal(exact, cropped)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(turbojpeg, "_library", lambda: None)
    with pytest.raises(UserError, match=r"needs libjpeg-turbo 3, .*pip install 'saccade\[jpeg\]'"):
        ImageFolder(str(tmp_path), decode="cropped")


@pytest.mark.parametrize("factor", [1, 3])
def test_scaled_decoding(factor):
    """The same crops; pixels differ little, and not at all where the full size is needed."""
    large = io.BytesIO()
    PHOTOGRAPH.resize((400 * factor, 300 * factor), Image.Resampling.BICUBIC).save(large, "JPEG", quality=92)
    inputs = INPUTS | dict(input_size=(3, 224, 224))
    exact, scaled = (
        torch.stack(seeded(Augment(decode, how, **inputs, color_jitter=0.0), large.getvalue(), lambda: "a file"))
        for how in ("exact", "scaled")
    )
    difference = (exact.float() - scaled.float()).abs()
    assert torch.equal(exact, scaled) if factor == 1 else 0 < difference.mean() < 2
    assert difference.amax() <= 64 and difference.flatten(1).mean(1).amax() < 3  # of 255
    whole, least = (np.asarray(decode(large.getvalue(), lambda: "a file", n).resize((64, 64))) for n in (None, 256))
    assert np.abs(whole.astype(int) - least).mean() < 2
    assert decode(large.getvalue(), lambda: "a file", 256).size == ((400, 300) if factor == 1 else (600, 450))
