"""The page of `saccade explain --serve` in a real browser: a click moves the map, and nothing leaves the machine."""

import asyncio
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saccade.explain import subject as subjects
from saccade.train.runtime.errors import UserError
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
    folder = tmp_path_factory.mktemp("pictures")
    explainer = page_module.Explainer(["biformer_t", "davit_t"])
    page = page_module.make_page(explainer, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page_module.launch(page, "127.0.0.1", port, folder)
    served = Address(f"http://127.0.0.1:{port}")
    served.folder = str(folder)
    yield served
    gr.close_all(verbose=False)
    patch.undo()


def _small(name, *options):
    made = subjects._of_model(name, build(name).eval(), "untrained weights")
    made.size_for = lambda height, width: (96, 96)
    return made


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_moves_the_map(address, tmp_path):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    asked = []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1400, height=900))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        for side in (0, 1):
            tab.wait_for_selector(f"#map{side} img", timeout=60_000)
        before = [tab.get_attribute(f"#map{side} img", "src") for side in (0, 1)]
        box = tab.locator("#picture img").bounding_box()
        tab.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
        for side in (0, 1):
            moved = "([id, src]) => document.querySelector(id).src !== src"
            tab.wait_for_function(moved, arg=[f"#map{side} img", before[side]], timeout=60_000)
        assert "untrained weights" in tab.inner_text("#text0")
        screenshot = tmp_path / "page.png"
        tab.screenshot(path=screenshot)
        browser.close()
    assert np.asarray(Image.open(screenshot)).std() > 20
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside


def test_refuses_large_and_unreadable_pictures(tmp_path, monkeypatch):
    explainer = page_module.Explainer(["biformer_t"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="the file is not a picture that can be read"):
        explainer.picture(str(tmp_path / "text.png"))
    monkeypatch.setattr(page_module, "PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="the picture has 10 x 10 pixels, more than"):
        explainer.picture(str(tmp_path / "large.png"))
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
        picture = dict(path=uploaded, meta={"_type": "gradio.FileData"})
        data = dict(data=[picture, "biformer_t", None])
        reply = await http.post(f"{address}/gradio_api/call/show0", json=data)
        if reply.status_code != 200:
            return str(reply.status_code)
        end = await http.get(f"{address}/gradio_api/call/show0/{reply.json()['event_id']}")
        return "answered" if "event: complete" in end.text and "untrained weights" in end.text else end.text[:200]

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(timeout=180, limits=httpx.Limits(max_connections=200)) as http:
            return await asyncio.gather(*(ask(http, i) for i in range(200)))

    results = asyncio.run(ask_all())
    assert set(results) <= {"answered", "503"} and results.count("answered") >= page_module.QUEUE, set(results)


class Address(str):
    """The page's address, with the folder of its pictures."""

    folder: str
