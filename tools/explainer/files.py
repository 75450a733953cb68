"""The images, the animation and the numbers of an explanation, written as a whole or not at all."""

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from saccade.train.data.bad_images import BadImage, printable
from saccade.train.data.images import read_image
from saccade.train.runtime.checkpoint import to_json
from saccade.train.runtime.errors import UserError
from saccade.train.visual.attention import QUERY, choose_layers, draw_map
from saccade.train.visual.captions import figure_text
from saccade.train.visual.figure import plt

from .methods import Explained, explain, record
from .subject import Subject, load

LONGEST = 640  # pixels of an overlay's longer side, at most
INDEX = "explained.json"  # what a folder holds; a folder with it may be replaced


def draw(image: Image.Image, one: Explained) -> Image.Image:
    """Draw a map over the image, with the query framed, or the samples of a lifter as dots."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST, LONGEST))
    if one.name.endswith(":time"):  # a map of the ground, not of the image
        image = Image.new("RGB", (448, 448))
    drawn = Image.fromarray(draw_map(np.array(image), one.values, one.frame))
    if one.name.endswith(":time"):
        drawn = drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM)  # ahead is up
    if one.points is not None:
        pen, most = ImageDraw.Draw(drawn), max(one.points[:, 2].max(initial=0), 1e-12)
        for x, y, weight in one.points:
            radius = 1.5 + 4 * (weight / most) ** 0.5
            box = [x * drawn.width - radius, y * drawn.height - radius]
            pen.ellipse([*box, box[0] + 2 * radius, box[1] + 2 * radius], outline="#00d5ff", width=2)
    return drawn


def title(drawn: Image.Image, text: str) -> Image.Image:
    """Return an image with a line of text above it."""
    page = Image.new("RGB", (drawn.width, drawn.height + 18), "#101014")
    page.paste(drawn, (0, 18))
    ImageDraw.Draw(page).text((4, 3), text, fill="white")
    return page


def draw_overview(
    image: Image.Image, chosen: Sequence[Explained], heading: str, prediction: Image.Image | None = None
) -> Image.Image:
    """Draw the image with the query, the prediction where there is a drawn one, and the chosen maps.

    heading: lines above them, of which each is shortened to fit.
    """
    image = image.convert("RGB")
    panels = [("image", image), *([("prediction", prediction)] if prediction is not None else [])]
    panels += [
        (f"{one.layer.removesuffix('.attn')}\n{one.name.rpartition(':')[2]}", draw(image, one)) for one in chosen
    ]
    frames = [one.frame for one in chosen if one.frame is not None and not one.name.endswith(":time")]
    legend = "cross and frames: the query; bright: what it attends to" if frames else "bright: where the map is large"
    if any(one.points is not None for one in chosen):
        legend = "circles: where the cell samples the image, larger with more weight"
    cross = None
    if frames:
        top, left, bottom, right = min(frames, key=lambda f: (f[2] - f[0]) * (f[3] - f[1]))
        cross = (left + right) / 2, (top + bottom) / 2
    return draw_panels(panels, heading, legend, cross)


def draw_panels(
    panels: Sequence[tuple[str, Image.Image]], heading: str, legend: str, cross: tuple[float, float] | None = None
) -> Image.Image:
    """Draw titled images in rows, between a heading and a legend; a cross at (x, y), as shares, of the first one."""
    columns = 3 if len(panels) == 6 else min(5, len(panels))
    rows = -(-len(panels) // columns)
    first = panels[0][1]
    ratio = min(max(first.height / first.width, 0.5), 1.5)
    lines = max(name.count("\n") + 1 for name, _ in panels)
    size = (2.4 * columns, (2.35 * ratio + 0.1 + 0.17 * lines) * rows + 0.35 + 0.17 * len(heading.splitlines()))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image) in zip(axes.flat, panels):
        axis.imshow(image, interpolation="nearest" if image.width < 200 else "antialiased")
        axis.set_title(name, fontsize=9)
    if cross is not None:
        x, y = cross[0] * first.width - 0.5, cross[1] * first.height - 0.5
        axes[0, 0].plot(x, y, "+", color=QUERY, markersize=12, markeredgewidth=2)
    if heading:
        figure.suptitle("\n".join(figure_text(line) for line in heading.splitlines()), fontsize=10)
    figure.supxlabel(legend, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def check_out(out: Path) -> None:
    """Raise UserError where --out would replace something else than an earlier explanation."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            files = set(json.loads((out / INDEX).read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            files = set()
        other = sorted({path.name for path in out.iterdir()} - files)
        if other:
            raise UserError(f"--out {out} has files of yours ({printable(other[0])}): give another folder")


def write(
    out: Path,
    image: Image.Image,
    explained: Sequence[Explained],
    facts: dict[str, Any],
    gif: bool,
    prediction: Image.Image | None = None,
) -> list[str]:
    """Write OUT/overview.png, OUT/NAME.png for each map, OUT/maps.npz, OUT/explained.json and, with gif,
    OUT/layers.gif. prediction: drawn on the image, for the overview."""
    out.parent.mkdir(parents=True, exist_ok=True)
    heading = facts["model"] + (f"\n{facts['predicted']}" if "predicted" in facts else "")
    files: dict[str, bytes] = {}
    files["overview.png"] = _encoded(draw_overview(image, choose_layers(explained), heading, prediction), format="PNG")
    frames = []
    for one, entry in zip(explained, facts["maps"]):
        drawn = draw(image, one)
        entry["file"] = re.sub(r"[^\w.-]+", "_", one.name) + ".png"
        files[entry["file"]] = _encoded(drawn, format="PNG")
        frames.append(title(drawn, one.name).resize((448, round(448 * (drawn.height + 18) / drawn.width))))
    if gif:
        same = [frame.resize(frames[0].size) for frame in frames]
        files["layers.gif"] = _encoded(
            same[0], format="GIF", save_all=True, append_images=same[1:], duration=600, loop=0
        )
    arrays: dict[str, Any] = {one.name: one.values for one in explained}
    arrays |= {f"{one.name}/query": np.array(one.query) for one in explained if one.query is not None}
    arrays |= {f"{one.name}/points": one.points for one in explained if one.points is not None}
    head = explained[0].head
    numbers = io.BytesIO()
    np.savez_compressed(numbers, head=np.array(-1 if head is None else head), **arrays)
    files["maps.npz"] = numbers.getvalue()
    facts["files"] = [*files, INDEX]
    files[INDEX] = (to_json(facts) + "\n").encode()
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        folder.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)  # an earlier explanation, see check_out
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return facts["files"]


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def list_layers(subject: Subject, image: Image.Image | None) -> list[dict[str, Any]]:
    """Return the layers of a model with attention: name, kind, grid, heads, and whether there is a query."""
    records = record(subject, image or Image.new("RGB", (64, 64)))
    return [
        dict(name=one.name, kind=one.kind, grid=list(one.grid), heads=one.heads, query=one.has_query) for one in records
    ]


def _read(file: Path) -> Image.Image:
    """Read an image. Raises UserError, which for a folder or a missing file does not advise to repair it."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give one image")
    if not file.exists():
        raise UserError(f"the image {file} does not exist")
    try:
        return read_image(file)
    except BadImage as error:
        raise UserError(str(error)) from error


def run(
    spec: str,
    file: Path | None,
    layer: str | None = None,
    head: int | None = None,
    query: tuple[float, float] | None = None,
    out: Path = Path("explained"),
    method: str = "attention",
    target: int | None = None,
    gif: bool = False,
    list_only: bool = False,
    as_json: bool = False,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    device: str | None = None,
) -> None:
    """Do what `saccade explain` does: see tools/explain.py."""
    if file is None and not list_only:
        raise UserError("give an image after the model, or --list for the model's layers")
    if method == "gradcam" and (head is not None or query is not None):
        raise UserError(f"--{'head' if head is not None else 'query'} does not apply to --method gradcam")
    image = None if file is None else _read(file)
    if not list_only:
        check_out(out)
    subject = load(spec, checkpoint, pretrained, device)
    if list_only:
        rows = list_layers(subject, image)
        if as_json:
            print(to_json(rows))
            return
        for row in rows:
            size = f"{row['grid'][0]}x{row['grid'][1]}"
            heads = f"{row['heads']:>3} head{'s' if row['heads'] > 1 else ' '}"
            print(f"{row['name']:<48} {size:>9}  {heads}{'' if row['query'] else '  no query'}".rstrip())
        return
    assert image is not None
    explained = explain(subject, image, layer, head, query, method, target)
    facts = dict(model=spec, weights=subject.note, image=str(file), method=method, query=query, head=head)
    facts["maps"] = [dict(name=one.name, **one.facts, cell=one.query, sum=float(one.values.sum())) for one in explained]
    text, prediction = subject.predict(image)
    if text:
        facts["predicted"] = text
    files = write(out, image, explained, facts, gif, prediction)
    if as_json:
        print(to_json(facts))
        return
    print(f"{spec}: {subject.note}")
    if subject.is_lifter:
        print("the image is taken for that of one camera that looks ahead, with a field of view of 70 degrees")
    if "predicted" in facts:
        print(f"predicted: {facts['predicted']}")
    shown = files if len(files) <= 6 else [*files[:3], "…", "maps.npz", *(["layers.gif"] if gif else [])]
    print(f"{len(explained)} map{'s' if len(explained) > 1 else ''} in {out}: {', '.join(shown)}")
