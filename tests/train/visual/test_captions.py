"""Captions can be read: in a font that has their characters, escaped where none has, and not over one another."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw
from saccade.train.visual import boxes, captions, label_maps


@pytest.mark.parametrize(
    "text, shown",
    [
        ("café, Straße, Ελλάδα", "café, Straße, Ελλάδα"),
        ("$5_$10\\x^2", "$5_$10\\x^2"),
        ("caf\udce9", "caf\\udce9"),
        ("a\x1b[31m\tb", "a\\x1b[31m\\tb"),
        ("two\nlines", "two\nlines"),
        ("x" * 100, "x" * 49 + "…"),
    ],
)
def test_text_on_images(text, shown):
    prepared, font = captions.prepare_text(text, 12)
    assert prepared == shown and font.getlength(prepared.split("\n")[0]) > 5


def test_fonts_are_chosen_by_their_characters(monkeypatch):
    """Where no installed font has a character it is escaped; where one has, that font is taken."""
    monkeypatch.setattr(captions, "list_fonts", lambda: (captions.DEJAVU,))
    captions.find_font.cache_clear()
    assert captions.prepare_text("猫 cat", 12)[0] == "\\u732b cat"
    assert captions.figure_text("猫 $x$") == "\\u732b \\$x\\$"
    folder = captions.DEJAVU.rpartition("/")[0]
    monkeypatch.setattr(captions, "list_fonts", lambda: (captions.DEJAVU, f"{folder}/STIXGeneral.ttf"))
    captions.find_font.cache_clear()
    known = captions.read_charmap(f"{folder}/STIXGeneral.ttf") - captions.read_charmap(captions.DEJAVU)
    script = chr(min(c for c in known if chr(c).isprintable() and c > 0x2000))
    text, font = captions.prepare_text(script, 12)
    assert text == script and font.getname()[0] == "STIXGeneral"
    captions.find_font.cache_clear()


def test_legend_labels_that_begin_with_an_underscore():
    """matplotlib leaves those out of its legends."""
    assert captions.figure_text("_bg") == " _bg"


def test_captions_do_not_overlap_where_there_is_room():
    image = Image.new("RGB", (600, 400))
    same = [(200, 100, 400, 300)] * 6
    placed = []
    for box in same:
        placed.append(captions.place_caption(image.size, box, (90, 20), placed))
    assert all(captions._overlap(a, b) == 0 for a, b in itertools.combinations(placed, 2))
    assert all(x0 >= 0 and y0 >= 0 and x1 <= 600 and y1 <= 400 for x0, y0, x1, y1 in placed)
    captions.draw_captions(ImageDraw.Draw(image), image.size, same, ["a cat 0.99"] * 6, ["#e6194b"] * 6, 14)
    assert np.asarray(image).any()


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (40, 30), (3000, 2000)])
def test_boxes_on_images_of_any_size(size):
    """Letters grow with the image; the highest scores are drawn first, and a legend counts all."""
    objects = [dict(name=name, score=s, box=[0, 0, *size]) for name, s in (("猫", 0.9), ("$dog$", 0.8), ("猫", 0.7))]
    drawn = boxes.draw_detections(Image.new("RGB", size), objects, ["猫", "$dog$"], limit=2)
    assert max(drawn.size) >= boxes.MIN_SIDE
    plain = boxes.draw_detections(Image.new("RGB", size), objects, ["猫", "$dog$"], legend=False)
    assert drawn.height > plain.height
    assert boxes.font_size(Image.new("RGB", (3000, 2000))) == 40 and boxes.font_size(plain) >= 13


def test_limit(monkeypatch):
    drawn = []
    monkeypatch.setattr(boxes, "draw_boxes", lambda image, b, captions, *_: drawn.extend(captions) or image)
    objects = [dict(name="a", score=s / 100, box=[0, 0, 5, 5]) for s in range(100)]
    boxes.draw_detections(Image.new("RGB", (500, 500)), objects, ["a"], limit=2)
    assert drawn == ["a 0.99", "a 0.98"]


def test_label_maps_of_any_class_name(tmp_path):
    names = ["$a$", "caf\udce9", "猫", "_b"]
    labels = np.arange(4).repeat(25).reshape(10, 10)
    image = np.zeros((10, 10, 3), np.uint8)
    file = tmp_path / "sheet.png"
    label_maps.save_contact_sheet([[(image, None), (image, labels)]], ("image", "labels"), names, file)
    assert Image.open(file).height > 200
