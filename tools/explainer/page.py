"""`saccade explain --serve`: a page where one clicks an image and sees what two models do with it, by Gradio.

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, no sharing. It serves this machine only,
unless told otherwise; uploads, pixels and the queue are limited.
"""

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from saccade.backbones.attention_maps import AttentionMap
from saccade.train.data.bad_images import BadImage
from saccade.train.data.images import read_image, stored_size
from saccade.train.predict import check_model
from saccade.train.runtime.errors import UserError

from .files import draw
from .methods import of_record, record
from .subject import Subject, load

MODELS = ["biformer_t", "davit_t", "nat_m", "dinat_m", "agent_deit_t", "agent_swin_t", "sparsifiner_deit_t"]
MODELS += ["patnet_t0", "ela_resnet18", "ulsam_mobilenet_v2", "halo_h0"]
SHIPPED = ("chelsea", "astronaut", "coffee", "rocket")  # of scikit-image, in its package
# Limits: of a file, of an image, of requests that wait, of models in memory.
UPLOAD, PIXELS, QUEUE, KEPT = "10mb", 30_000_000, 32, 4


class Cache:
    """The latest few results of a function, which is called by one thread at a time."""

    def __init__(self, make: Callable[..., Any], size: int):
        self.make, self.size, self.lock = make, size, threading.Lock()
        self.results: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, *key: Hashable) -> Any:
        with self.lock:
            if key not in self.results:
                self.results[key] = self.make(*key)
            self.results.move_to_end(key)
            while len(self.results) > self.size:
                self.results.popitem(last=False)
            return self.results[key]


class Explainer:
    """What the page shows: maps of the models `names` on images in files."""

    def __init__(self, names: Sequence[str], checkpoint: Path | None = None, device: str | None = None):
        self.names = list(names)
        self.subject = Cache(lambda name: load(name, checkpoint if name == names[0] else None, False, device), KEPT)
        self.records = Cache(self._records, 2 * KEPT)

    def image(self, file: str) -> Image.Image:
        """Read an image. Raises UserError for one that is too large or unreadable."""
        try:
            (width, height), _ = stored_size(file)
            if width * height > PIXELS:
                raise UserError(f"the image has {width} x {height} pixels, more than {PIXELS / 1e6:.0f} million")
            return read_image(file)
        except BadImage as error:
            raise UserError(f"the image {error.reason}") from error
        except (OSError, Image.DecompressionBombError, SyntaxError) as error:
            raise UserError("the file is not an image that can be read") from error

    def _records(self, name: str, file: str) -> tuple[Subject, Image.Image, list[AttentionMap], str, Any]:
        """Return what clicks on an image need again: its maps, what the model is and predicts, in words and drawn."""
        if name not in self.names:
            raise UserError(f"{name} is not offered here")
        image, subject = self.image(file), self.subject(name)
        text, drawn = subject.predict(image)
        text = f"{text} ({subject.note})" if text else subject.note
        return subject, image, record(subject, image), text, drawn

    def prediction(self, name: str, file: str) -> Image.Image | None:
        """Return the image with what a detector or segmenter predicts drawn on it; None for other models."""
        return self.records(name, file)[4]

    def layers(self, name: str, file: str) -> tuple[list[str], str]:
        """Return the names of all maps, and the one to begin with: the last that depends on a query, if any does."""
        records = self.records(name, file)[2]
        with_query = [one.name for one in records if one.has_query]
        return [one.name for one in records], (with_query or [records[-1].name])[-1]

    def show(self, name: str, layer: str | None, file: str, point: tuple[float, float] | None) -> tuple[Any, str]:
        """Return the overlay of a layer, and what the model is and predicts. point: (x, y) as shares of the image."""
        subject, image, records, text, _ = self.records(name, file)
        chosen = next((one for one in records if one.name == layer), records[-1])
        query = None if point is None else (point[0] * image.width, point[1] * image.height)
        return draw(image, of_record(subject, chosen, image, None, query)), text


def shipped_images(folder: Path) -> list[str]:
    """Write the images that scikit-image ships to a folder, and return their files."""
    from skimage import data

    files = []
    for name in SHIPPED:
        files.append(str(folder / f"{name}.png"))
        Image.fromarray(np.asarray(getattr(data, name)())).save(files[-1])
    return files


def make_page(explainer: Explainer, folder: Path) -> Any:
    """Build the page as Gradio's Blocks; shipped images are written to `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    images = shipped_images(folder)
    names = explainer.names

    def guarded(function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except UserError as error:
                raise gr.Error(str(error)) from error

        return call

    def refresh(file: str | None, name: str, layer: str | None, point: Any) -> tuple[Any, Any, str, Any]:
        if file is None:
            return gr.Dropdown(choices=[], value=None), None, "", gr.Image(None, visible=False)
        layers, first = explainer.layers(name, file)
        layer = layer if layer in layers else first
        drawn = explainer.prediction(name, file)
        overlay, text = explainer.show(name, layer, file, point)
        return gr.Dropdown(choices=layers, value=layer), overlay, text, gr.Image(drawn, visible=drawn is not None)

    with gr.Blocks(title="saccade explain", analytics_enabled=False) as page:
        point = gr.State(None)
        gr.Markdown("# saccade explain\nClick the image: each model shows what that point attends to.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(images[0], type="filepath", label="image", elem_id="image", sources=["upload"])
                shipped = gr.Dropdown([(Path(f).stem, f) for f in images], value=images[0], label="shipped images")
            sides = []
            for i in range(2):
                with gr.Column():
                    model = gr.Dropdown(names, value=names[min(i, len(names) - 1)], label="model", elem_id=f"model{i}")
                    layer = gr.Dropdown([], label="layer", elem_id=f"layer{i}", allow_custom_value=True)
                    overlay = gr.Image(
                        label="map", interactive=False, elem_id=f"map{i}", format="png",
                        buttons=["fullscreen", "download"],  # none to share it, which uploads it
                    )  # fmt: skip
                    text = gr.Markdown(elem_id=f"text{i}")
                    drawn = gr.Image(
                        label="prediction", interactive=False, elem_id=f"prediction{i}", format="png", visible=False,
                        buttons=["fullscreen", "download"],
                    )  # fmt: skip
                    sides.append((model, layer, overlay, text, drawn))

        def clicked(file: str | None, event: gr.SelectData) -> tuple[float, float] | None:
            if file is None:
                return None
            size = guarded(explainer.image)(file).size
            return (event.index[0] + 0.5) / size[0], (event.index[1] + 0.5) / size[1]

        shipped.change(lambda file: (file, None), shipped, [image, point], api_visibility="private")
        click = image.select(clicked, image, point, api_visibility="private")
        for i, (model, layer, overlay, text, drawn) in enumerate(sides):
            inputs, outputs = [image, model, layer, point], [layer, overlay, text, drawn]
            click.then(guarded(refresh), inputs, outputs, api_visibility="private")
            for event in (page.load, image.change, model.change):
                event(guarded(refresh), inputs, outputs, api_visibility="private")
            layer.input(guarded(refresh), inputs, outputs, api_name=f"show{i}")
    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    return page


def launch(page: Any, host: str, port: int, folder: Path) -> None:
    """Serve a page in threads of this process. Raises UserError where the port is taken."""
    import gradio as gr

    for attempt in range(3):
        try:
            page.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=UPLOAD, allowed_paths=[str(folder)], enable_monitoring=False, ssr_mode=False,
                theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]), footer_links=[],
            )  # fmt: skip
            return
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} of {host} can't be used: give another one") from error
        except ValueError:  # Gradio asks its own page within three seconds, which a busy machine may miss
            page.close(verbose=False)
            if attempt == 2:
                raise


def serve(
    names: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    checkpoint: Path | None = None,
    device: str | None = None,
) -> None:
    """Serve the page until Ctrl-C. names: models or runs to offer first."""
    if find_spec("gradio") is None:
        raise UserError("--serve needs gradio: pip install 'saccade[web]'")
    for name in names:
        check_model(name)
    names = list(dict.fromkeys([*names, *MODELS]))
    explainer = Explainer(names, checkpoint, device)
    explainer.subject(names[0])  # weights that do not fit are told at once
    with tempfile.TemporaryDirectory(prefix="saccade-explain-") as folder:
        page = make_page(explainer, Path(folder))
        launch(page, host, port, Path(folder))
        print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
        page.block_thread()
