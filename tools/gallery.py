"""Make docs/gallery.md: what the attention of every family does, on digits and on a photograph.

    python tools/gallery.py                    train what is missing (half an hour on two cores), then write the page
    python tools/gallery.py --epochs 6         train for fewer epochs
    python tools/gallery.py --no-train         with the runs there are in runs/gallery

Each family is shown on a photograph with untrained weights, which tells where its layers can look, and on digits after
a training of configs/digits, which tells what they look at.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "gallery"
PAGE, PICTURES = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
OVERVIEW = ROOT / "docs" / "attention.png"
# A model of each family, its page in docs/models, and what to look for. Those with a config in configs/digits are
# trained.
FAMILIES = dict(
    biformer_t=("biformer", "A region looks at the few regions it is routed to (`regions`), and weighs their pixels."),
    davit_t=("davit", "Windows cut the map; channel attention has no query and writes where its heads are strong."),
    dinat_m=("nat", "Every pixel has a window around it, in some layers a dilated one."),
    halo_h0=("halonet", "A block of pixels looks at itself and a halo around it."),
    agent_pvt_t=("agent", "Few agents gather from the whole map (`gather`) and give to every position (`give`)."),
    sparsifiner_deit_t=(
        "sparsifiner",
        "A patch keeps some keys (`kept`), chosen by a low-rank estimate, and weighs them.",
    ),
    patnet_t0=("patnet", "Gates of channels and positions; the last stage attends to all of its map."),
    ela_resnet18=("ela", "The product of a gate for each row and one for each column."),
    ulsam_mobilenet_v2=("ulsam", "Each subspace of channels has a map of its own; their mean is shown."),
    dfa3d_bev_s=("dfa3d", "A cell of the bird's-eye view samples a camera's image at the points above it (dots)."),
)
# The layers of docs/attention.png, with untrained weights, and what the image calls them.
LAYERS = {
    "biformer_t": ("stages.2.blocks.7.attn:regions", "BiFormer: routed regions"),
    "dinat_m": ("stages.2.blocks.5", "DiNAT: dilated neighborhood"),
    "halo_h0": ("stages.2.0", "HaloNet: block and halo"),
    "davit_t": ("stages.2.blocks.2.0.attn:window", "DaViT: window"),
    "sparsifiner_deit_t": ("blocks.11.attn:kept", "Sparsifiner: kept keys"),
}
LEAST = 4  # rows or columns of a map that is shown, where there are any
COLUMNS = 4
PHOTOGRAPH = "chelsea"  # of scikit-image: CC0, by Stéfan van der Walt
QUERY = 171, 113  # the cat's eye


def train(name: str, epochs: int | None) -> None:
    """Train a model of configs/digits into runs/gallery."""
    config = ROOT / "configs" / "digits" / f"{name}.py"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config), "--run-dir", str(RUNS / name)]
    subprocess.run([*command, "--overwrite", *([f"epochs={epochs}"] if epochs else [])], check=True)


def kind_of(one: Any) -> str:
    return one.name.rpartition(":")[2]


def choose(records: list[Any]) -> list[Any]:
    """Choose the maps of a figure: the last one of each kind and resolution, at most COLUMNS, every kind among them."""
    large = [one for one in records if min(one.grid) >= LEAST] or records
    last = {(kind_of(one), one.grid): one for one in large}
    kinds = {kind_of(one): one for one in last.values()}  # the last resolution of each kind
    others = [one for one in last.values() if one not in kinds.values()]
    chosen = [*kinds.values(), *reversed(others)][:COLUMNS]
    return [one for one in large if one in chosen]


def show_digits(run: Path, file: Path) -> str:
    """Draw the maps of a run on three digits of the test images; return what the run is."""
    import torch
    from saccade.train.predict import predictor
    from saccade.train.runtime import config
    from saccade.train.visual.attention import plot_layers, to_pixels

    settings = config.load(run / "config.py")
    model = predictor(run, "cpu").model
    data = config.build(settings["data"])
    images = data.dataset("test", data.inputs(model.pretrained_cfg))
    first = {label: i for i, (_, label) in reversed(list(enumerate(images)))}  # of each class
    x = torch.stack([images[first[label]][0] for label in (2, 6, 9)])
    records = choose(model.attention_maps(x))
    plot_layers(records, to_pixels(x), ["2", "6", "9"], file)
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    top1 = max(line["top1"] for line in lines if line["kind"] == "val")
    return f"trained for {settings['epochs']} epochs ({top1:.1f} % top-1 on the validation images)"


def show_photograph(name: str, file: Path) -> bool:
    """Draw the maps of an untrained model on a photograph; return whether they depend on a query."""
    from PIL import Image
    from saccade.explain import explain, load
    from saccade.explain.files import draw_overview
    from skimage import data

    subject, image = load(name, device="cpu"), Image.fromarray(getattr(data, PHOTOGRAPH)())
    query = None if subject.is_lifter else QUERY  # a lifter's is in metres: what is a little ahead
    chosen = choose(explain(subject, image, query=query))
    save(draw_overview(image, chosen, ""), 0.67, file)
    return any(one.has_query for one in chosen)


def save(drawn: Any, scale: float, file: Path) -> None:
    """Write a figure at a share of its size."""
    from PIL import Image

    drawn.resize([round(scale * side) for side in drawn.size], Image.Resampling.LANCZOS).save(file, optimize=True)


def draw_layers(file: Path) -> None:
    """Draw where a layer of several families lets the cat's eye look."""
    from PIL import Image
    from saccade.explain import explain, load
    from saccade.explain.files import draw, draw_panels
    from skimage import data

    image = Image.fromarray(getattr(data, PHOTOGRAPH)())
    panels = [("a query in the image", image)]
    for name, (layer, title) in LAYERS.items():
        (one,) = explain(load(name, device="cpu"), image, layer, query=QUERY)
        panels.append((title, draw(image, one)))
    cross = QUERY[0] / image.width, QUERY[1] / image.height
    legend = "one layer each, untrained weights; framed: the query's cell; bright: what it attends to"
    save(draw_panels(panels, "", legend, cross), 0.74, file)


def write_page(trained: dict[str, str], drawn: set[str]) -> None:
    """Write docs/gallery.md. trained: of each model with a run, what the run is; drawn: models on the photograph."""
    lines = [
        "# Gallery",
        "",
        "What the attention of every family does with an image: framed is the query, bright what it attends to.",
        "Written by `python tools/gallery.py`; `saccade explain` draws the same for your model and image",
        "([explain.md](explain.md)).",
        "",
        "On the photograph, models have untrained weights: there the images show *where* a layer can look. On",
        "digits, small models that were trained for minutes show *what* it looks at. The cat is scikit-image's",
        "`chelsea`, by Stéfan van der Walt (CC0).",
    ]
    for name, (page, text) in FAMILIES.items():
        lines += ["", f"## {name}", "", f"{text} [More](models/{page}.md)."]
        if name in drawn:
            lines += ["", f"![Where an untrained {name} can look](gallery/{name}_photograph.png)"]
        if name in trained:
            lines += ["", f"A small one, {trained[name]}:", ""]
            lines += [f"![What a trained {name} attends to](gallery/{name}_digits.png)"]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of a training (default: the config's)")
    parser.add_argument("--no-train", action="store_true", help="train nothing")
    args = parser.parse_args()

    PICTURES.mkdir(exist_ok=True)
    trained, drawn = {}, set()
    for name in FAMILIES:
        has_config = (ROOT / "configs" / "digits" / f"{name}.py").is_file()
        if has_config and not args.no_train and not (RUNS / name / "model.safetensors").is_file():
            train(name, args.epochs)
        if (RUNS / name / "model.safetensors").is_file():
            trained[name] = show_digits(RUNS / name, PICTURES / f"{name}_digits.png")
            print(f"{name}: {trained[name]}", flush=True)
        photograph = PICTURES / f"{name}_photograph.png"
        if show_photograph(name, photograph) or name not in trained:
            drawn.add(name)
        else:  # gates of untrained weights are the same everywhere
            photograph.unlink()
    draw_layers(OVERVIEW)
    write_page(trained, drawn)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
