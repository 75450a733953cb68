"""Text on images and figures: choice of fonts, escapes for characters that no font has, captions and legends."""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DEJAVU = str(Path(find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")
MAX_LENGTH = 50  # characters of a class name that are shown
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


@cache
def read_charmap(font: str) -> frozenset[int]:
    """Return the code points that a font file has outlines for; none if it can't be drawn with at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(font, 16).getmask("x")  # bitmap fonts, such as color emoji, have fixed sizes
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def list_fonts() -> tuple[str, ...]:
    """List the font files to choose from: DejaVu Sans, which comes with matplotlib, then all that are installed."""
    from matplotlib import font_manager

    return DEJAVU, *sorted(font_manager.findSystemFonts())


@cache
def find_font(text: str) -> str:
    """Return the first font file that has every character of the text, or else the one that has most of them."""
    wanted = {ord(c) for c in text if not c.isspace()}
    if all(32 < c < 127 or 160 < c < 384 for c in wanted) or wanted <= read_charmap(DEJAVU):
        return DEJAVU
    return max(list_fonts(), key=lambda font: len(wanted & read_charmap(font)))  # the first of equals


def escape_missing(text: str, characters: frozenset[int]) -> str:
    """Escape control characters, undecodable bytes, and characters that are not among `characters`."""
    shown = [c if c == "\n" or (ord(c) in characters and c.isprintable()) else _escape(c) for c in text]
    return shorten("".join(shown))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def shorten(text: str) -> str:
    """Cut the lines of a text to MAX_LENGTH characters."""
    return "\n".join(s if len(s) <= MAX_LENGTH else s[: MAX_LENGTH - 1] + "…" for s in text.split("\n"))


def prepare_text(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text that Pillow can draw, and the font to draw it with."""
    font = find_font(text)
    return escape_missing(text, read_charmap(font)), _load(font, size)


@cache
def _load(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, size)


def figure_text(text: str) -> str:
    """Return a text as matplotlib draws it literally: no mathematics between $ signs, no characters without a font.

    Installed fonts that have characters which DejaVu Sans lacks are added to matplotlib's families.
    """
    import matplotlib
    from matplotlib import font_manager

    known = set(read_charmap(DEJAVU))
    for character in sorted(set(text) - {"\n"}):
        if ord(character) not in known and ord(character) in read_charmap(font := find_font(character)):
            known |= read_charmap(font)
            font_manager.fontManager.addfont(font)
            family = font_manager.FontProperties(fname=font).get_name()
            families = matplotlib.rcParams["font.family"]
            matplotlib.rcParams["font.family"] = [*families, *({family} - set(families))]
    text = escape_missing(text.replace("\n", " "), frozenset(known)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out labels that begin with _


def draw_captions(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colors: Sequence[str],
    font_size: int,
) -> None:
    """Draw a caption at each box (left, top, right, bottom), outlined, where it covers the fewest earlier captions.

    size: (width, height) of the image. Where possible a caption stands above its box, else inside or below it.
    """
    placed: list[Rectangle] = []
    for box, caption, color in zip(boxes, captions, colors):
        text, font = prepare_text(caption, font_size)
        left, top, right, bottom = font.getbbox(text, stroke_width=2)
        spot = place_caption(size, box, (right - left, bottom - top), placed)
        placed.append(spot)
        light = sum(Image.new("RGB", (1, 1), color).getpixel((0, 0))) > 3 * 128
        stroke = dict(stroke_width=2, stroke_fill="black" if light else "white")
        draw.text((spot[0] - left, spot[1] - top), text, fill=color, font=font, **stroke)


def place_caption(
    size: tuple[int, int], box: Sequence[float], extent: tuple[float, float], placed: Sequence[Rectangle]
) -> Rectangle:
    """Choose where a caption of this extent (width, height) stands: the first free spot, or the least covered one."""
    (width, height), (left, top, right, bottom) = extent, box
    spots = []
    for x, y in (
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (right - width, top),
        (left, bottom - height),
        (left, bottom),
        (right - width, bottom),
        (right, top),
        (left - width, top),
        *((left, top + i * height) for i in range(1, 6)),
    ):
        x, y = (min(max(value, 0), max(limit - length, 0)) for value, limit, length in zip((x, y), size, extent))
        spots.append((x, y, x + width, y + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in placed))  # the first of equals


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def add_legend(image: Image.Image, entries: Sequence[tuple[str, str]], font_size: int = 12) -> Image.Image:
    """Return the image with a legend below it: a square of each entry's color, and its text."""
    if not entries:
        return image
    texts = [prepare_text(text, font_size) for _, text in entries]
    square, line = font_size, round(1.5 * font_size)
    widths = [square + font_size + math.ceil(font.getlength(text)) for text, font in texts]
    spots, x, y = [], 4, 4
    for width in widths:
        if x > 4 and x + width > image.width:
            x, y = 4, y + line
        spots.append((x, y))
        x += width
    full = max([image.width, *(x + width for (x, _), width in zip(spots, widths))])
    page = Image.new("RGB", (full, image.height + y + line + 2), "white")
    page.paste(image, (0, 0))
    draw = ImageDraw.Draw(page)
    for (color, _), (text, font), (x, y) in zip(entries, texts, spots):
        y += image.height
        draw.rectangle((x, y + 1, x + square, y + 1 + square), fill=color, outline="#333333")
        draw.text((x + square + 5, y + 1 + square / 2), text, fill="#222222", font=font, anchor="lm")
    return page
