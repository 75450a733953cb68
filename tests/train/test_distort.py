"""Photometric distortion against values by hand and the standard library's HSV."""

import colorsys

import pytest
import torch
from saccade.train.data import distort
from saccade.train.data.distort import distort_colors, rotate_hue, scale_saturation


def draw(monkeypatch, *values):
    drawn = iter(values)
    monkeypatch.setattr(distort, "uniform", lambda low, high: next(drawn))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("clip", "expected"), [(True, [0.15, 0.3, 0.5]), (False, [0.15, 0.3, 0.525])])
def test_brightness_is_added_and_contrast_multiplied(monkeypatch, first, clip, expected):
    # brightness? by; contrast? by; contrast first?; saturation?; hue?
    draw(monkeypatch, 0.0, 25.5, 0.0, 0.5, 0.0 if first else 0.9, 0.9, 0.9)
    image = torch.tensor([0.2, 0.5, 0.95]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(distort_colors(image, 0.1, clip)[:, 0, 0], torch.tensor(expected))


def test_colours_change_as_in_hsv():
    torch.manual_seed(0)
    image = torch.rand(3, 6, 7)
    image[:, 0, 0] = 0.4  # grey has no hue
    image[:, 0, 1] = 0.0
    pale, vivid, turned = scale_saturation(image, 0.6), scale_saturation(image, 1.4, clip=True), rotate_hue(image, 0.09)
    for y in range(6):
        for x in range(7):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            for found, hsv in (
                (pale, (h, 0.6 * s, v)),
                (vivid, (h, min(1, 1.4 * s), v)),
                (turned, ((h + 0.09) % 1, s, v)),
            ):
                assert found[:, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb(*hsv), abs=1e-6)


def test_channels_are_swapped_last(monkeypatch):
    draw(monkeypatch, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0)
    image = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    found = {tuple(distort_colors(image, 0.05, False, swap=False).flatten().tolist())}
    for seed in range(20):
        draw(monkeypatch, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0)
        torch.manual_seed(seed)
        found.add(tuple(distort_colors(image, 0.05, False, swap=True).flatten().tolist()))
    assert len(found) == 6
