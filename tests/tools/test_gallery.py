"""docs/gallery.md shows every family, with the images that tools/gallery.py draws."""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image
from saccade.backbones import catalog
from saccade.explain.methods import Explained
from support.families import build, images

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "tools/gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_has_every_family(gallery):
    pages = {module.rpartition(".")[2]: names for module, names in catalog.families().items()}
    shown = {page: name for name, (page, _) in gallery.FAMILIES.items()}
    assert shown.keys() == pages.keys() and all(shown[page] in names for page, names in pages.items())
    text = gallery.PAGE.read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(gallery/(\S+\.png)\)", text))
    assert linked == {path.name for path in gallery.PICTURES.iterdir()}
    assert {name.rpartition("_")[0] for name in linked} == set(gallery.FAMILIES)
    assert sum(path.stat().st_size for path in gallery.PICTURES.iterdir()) < 2e6
    assert all(Image.open(gallery.PICTURES / name).width > 500 for name in linked)


@pytest.mark.parametrize("name", ["biformer_t", "agent_pvt_t", "halo_h0"])
def test_chooses_every_kind(gallery, name):
    """The last map of each kind that is not tiny, up to four, in the order of the layers."""
    records = build(name).attention_maps(*images(name, batch=1))
    chosen = gallery.choose(records)
    places = [records.index(one) for one in chosen]
    assert places == sorted(places) and 1 < len(chosen) <= gallery.COLUMNS
    assert {one.kind for one in chosen} == {one.kind for one in records}
    assert all(min(one.grid) >= gallery.LEAST for one in chosen)
    assert Explained("a.b:kind", None).layer == "a.b" and gallery.kind_of(Explained("a.b:kind", None)) == "kind"
