"""The page of `saccade explain --serve` in a real browser: a click shows that point's map, and nothing leaves the
machine."""

import asyncio
import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saccade.explain import subject as subjects
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.task import Predictor
from support.families import build

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'saccade[web]'")
page_module = pytest.importorskip("saccade.explain.page")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of two small models, served by a thread of this process."""
    import gradio as gr

    patch = pytest.MonkeyPatch()
    patch.setattr(page_module, "load", _small)
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    folder = tmp_path_factory.mktemp("images")
    explainer = page_module.Explainer(["biformer_t", "davit_t"])
    page = page_module.make_page(explainer, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page_module.launch(page, "127.0.0.1", port, folder)
    served = Address(f"http://127.0.0.1:{port}")
    served.folder, served.explainer = str(folder), explainer
    yield served
    gr.close_all(verbose=False)
    patch.undo()


def _small(name, *options):
    made = subjects._of_model(name, build(name).eval(), "untrained weights")
    made.size_for = lambda height, width: (96, 96)
    if name == "davit_t":
        made.predictor = Striped()
    return made


class Striped(Predictor):
    """Predicts, and draws a red stripe, as a detector draws its boxes."""

    def predict(self, images):
        return [dict(objects=[])] * len(images)

    def describe(self, record):
        return "a stripe"

    def draw(self, image, record, limit=50):
        drawn = image.convert("RGB")
        drawn.paste((255, 0, 0), (0, 10, drawn.width, 30))
        return drawn


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_shows_that_points_map(address, tmp_path):
    """Both maps become the ones that Python computes for the clicked point; a drawn prediction is shown, too."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    asked, x, y = [], 0.83, 0.17
    names, file = ["biformer_t", "davit_t"], f"{address.folder}/chelsea.png"
    layers = [address.explainer.layers(name, file)[1] for name in names]
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1400, height=900))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)

        def pixels(place: str) -> np.ndarray:
            reply = tab.request.get(tab.get_attribute(f"#{place} img", "src"))
            return np.asarray(Image.open(io.BytesIO(reply.body())).convert("RGB"))

        for side in (0, 1):
            tab.wait_for_selector(f"#map{side} img", timeout=60_000)
            expected = address.explainer.show(names[side], layers[side], file, None)[0]
            np.testing.assert_array_equal(pixels(f"map{side}"), np.asarray(expected))
        before = [tab.get_attribute(f"#map{side} img", "src") for side in (0, 1)]
        box = tab.locator("#image img").bounding_box()
        tab.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        for side in (0, 1):
            moved = "([id, src]) => document.querySelector(id).src !== src"
            tab.wait_for_function(moved, arg=[f"#map{side} img", before[side]], timeout=60_000)
            expected = address.explainer.show(names[side], layers[side], file, (x, y))[0]
            np.testing.assert_array_equal(pixels(f"map{side}"), np.asarray(expected))
        assert tab.inner_text("#text0") == "untrained weights"
        assert tab.inner_text("#text1") == "a stripe (untrained weights)"
        assert tab.locator("#prediction0 img").count() == 0
        stripe = pixels("prediction1")[10:30]
        assert (stripe == (255, 0, 0)).all() and stripe.shape[1] == Image.open(file).width
        screenshot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "explain_page.png"
        tab.screenshot(path=screenshot, full_page=True)
        browser.close()
    assert np.asarray(Image.open(screenshot)).std() > 20
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside


def test_refuses_large_and_unreadable_pictures(tmp_path, monkeypatch):
    explainer = page_module.Explainer(["biformer_t"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="the file is not an image that can be read"):
        explainer.image(str(tmp_path / "text.png"))
    monkeypatch.setattr(page_module, "PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="the image has 10 x 10 pixels, more than"):
        explainer.image(str(tmp_path / "large.png"))
    with pytest.raises(UserError, match="vit_tiny_patch16_224 is not offered here"):
        explainer.layers("vit_tiny_patch16_224", "x.png")


@pytest.mark.exhaustive
def test_many_requests_are_answered_or_refused(address):
    """Of 200 at once, some get a map, the others are told that the queue is full; none fails otherwise or hangs."""
    import httpx
    from gradio_client import Client, handle_file

    example = next(Path(address.folder).glob("*.png"))
    answer = Client(address, verbose=False).predict(handle_file(str(example)), "biformer_t", None, api_name="/show0")
    assert answer[2] == "untrained weights"  # one alone is answered
    uploaded = httpx.post(f"{address}/gradio_api/upload", files=dict(files=example.open("rb"))).json()[0]

    async def ask(http: httpx.AsyncClient, number: int) -> str:
        image = dict(path=uploaded, meta={"_type": "gradio.FileData"})
        data = dict(data=[image, "biformer_t", None])
        reply = await http.post(f"{address}/gradio_api/call/show0", json=data)
        if reply.status_code != 200:
            return str(reply.status_code)
        end = await http.get(f"{address}/gradio_api/call/show0/{reply.json()['event_id']}")
        return "answered" if "event: complete" in end.text and "untrained weights" in end.text else end.text[:200]

    async def ask_all() -> list[str]:
        # A connection for each request, as of 200 people: the server closes idle ones after five seconds.
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=180, limits=limits) as http:
            return await asyncio.gather(*(ask(http, i) for i in range(200)))

    results = asyncio.run(ask_all())
    assert set(results) <= {"answered", "503"} and results.count("answered") >= page_module.QUEUE, set(results)


class Address(str):
    """The page's address, with the folder of its images and what it shows."""

    folder: str
    explainer: "page_module.Explainer"
