"""tools/predict.py: no file is lost, bad images do not end it, and what it writes is in the formats' own terms."""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from saccade.train import predict
from saccade.train.data import video
from saccade.train.data.bad_images import BadImage
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.task import Predictor


class Mean(Predictor):
    """Predicts an image's mean, and draws nothing on it; refuses images of one row."""

    class_names = ("mean",)
    calls = 0

    def predict(self, images):
        self.calls += 1
        if any(image.height == 1 for image in images):
            raise RuntimeError("too flat\nin line 7")
        return [dict(mean=float(np.asarray(image).mean())) for image in images]

    def describe(self, record):
        return f"{record['mean']:.0f}"

    def draw(self, image, record, limit=50):
        return image


def save(path: Path, grey: int = 0, size=(6, 5)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path)
    return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawn(images, out) -> list[Path]:
    return [one.written for one in predict.predict(Mean(), images, out=out)]


def test_inputs_are_never_replaced(tmp_path):
    """In the images' own folder: neither the input, nor one of the same stem, nor another file of the user's."""
    folder = tmp_path / "p"
    for name in ("a.png", "b.jpg", "b.png", "C.PNG", "c.jpg"):
        save(folder / name, 9)
    (folder / "notes.png").write_bytes(b"mine")
    before = contents(folder)
    images = [folder / name for name in ("a.png", "b.jpg", "C.PNG", "c.jpg")]  # b.png is no input
    written = drawn(images, folder)
    assert [path.name for path in written] == ["a_1.png", "b_1.png", "C_1.png", "c_2.png"]
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    assert [path.name for path in drawn(images, folder)] == [path.name for path in written], "those are our own"
    assert len(contents(folder)) == len(before) + 4
    # What was drawn may be an input too.
    again = drawn([written[0], *images], folder)
    assert written[0] not in again and len(set(again)) == 5


@pytest.mark.parametrize("link", ["folder", "output", "input"])
def test_links_lead_to_no_loss(tmp_path, link):
    data = save(tmp_path / "p/a.png", 9)
    out, image = tmp_path / "out", tmp_path / "p/a.png"
    if link == "folder":
        out.symlink_to(tmp_path / "p", target_is_directory=True)
    else:
        out.mkdir()
    if link == "output":
        (out / "a.png").symlink_to(image)
    if link == "input":
        image = tmp_path / "q/a.png"
        image.parent.mkdir()
        image.symlink_to(tmp_path / "p/a.png")
        out = tmp_path / "p"
    (written,) = drawn([image], out)
    assert written.name == "a_1.png" and (tmp_path / "p/a.png").read_bytes() == data
    assert link != "output" or (out / "a.png").is_symlink()


def test_equal_names_from_different_folders(tmp_path):
    images = [tmp_path / folder / name for folder in "xyz" for name in ("a.png", "A.png")]
    for grey, path in enumerate(images):
        save(path, 20 * grey)
    written = drawn(images, tmp_path / "out")
    assert len({path.name.casefold() for path in written}) == 6
    assert [np.asarray(Image.open(path)).mean() for path in written] == [0, 20, 40, 60, 80, 100]


def test_bad_images_do_not_end_it(tmp_path):
    """In the middle of a batch: text, an empty file, one that is gone, an image that the model can't take."""
    images = [tmp_path / f"{i}.png" for i in range(7)]
    for path in images:
        save(path, 10)
    images[1].write_text("no image")
    images[2].write_bytes(b"")
    images[3].unlink()
    save(images[4], 10, (500, 1))
    results = list(predict.predict(Mean(), images, batch_size=6))
    bad = [one for one in results if isinstance(one, BadImage)]
    assert {one.path for one in results if not isinstance(one, BadImage)} == {images[0], images[5], images[6]}
    assert [Path(one.name).name for one in bad] == ["1.png", "2.png", "3.png", "4.png"]
    assert bad[-1].reason == "of 500x1 pixels can't be predicted on (too flat)"


def test_bad_images_of_the_command(command, classifier_run, tmp_path):
    """The others are done and the json is written; code 65, and one sentence that names the bad ones."""
    for i in range(3):
        save(tmp_path / f"p/{i}.png", 80 * i)
    (tmp_path / "p/1.png").write_bytes(b"no image")
    code, out, err = command(
        "predict", classifier_run, tmp_path / "p", tmp_path / "gone.png", "--json", tmp_path / "p.json"
    )
    assert code == 65 and err.count("\n") == 1 and "2 of 4 images are left out" in err
    assert f"{tmp_path / 'p/1.png'} can't be read" in err and f"{tmp_path / 'gone.png'} can't be read" in err
    records = json.loads((tmp_path / "p.json").read_text())
    assert [record["image"] for record in records] == [str(tmp_path / f"p/{i}.png") for i in (0, 2)]
    assert [len(record["classes"]) for record in records] == [3, 3]
    assert re.search(r"^2 images: \d [12]", out.splitlines()[-1])


def test_which_images(tmp_path):
    save(tmp_path / "p/deep/er/b.PNG"), save(tmp_path / "p/a.jpg"), save(tmp_path / "p/.hidden/c.png")
    (tmp_path / "p/notes.txt").write_text("x")
    a, b = tmp_path / "p/a.jpg", tmp_path / "p/deep/er/b.PNG"
    assert predict.find_images([tmp_path / "p", a]) == [a, b]
    (tmp_path / "none/below").mkdir(parents=True)
    with pytest.raises(UserError, match="none holds no images"):
        predict.find_images([tmp_path / "none"])
    with pytest.raises(UserError, match=r"the image .*gone\.png does not exist"):
        predict.find_images([tmp_path / "gone.png"])
    assert len(predict.find_images([tmp_path / "gone.png", a])) == 2


@pytest.mark.parametrize(
    "content, is_ours",
    [
        (None, True),
        ("[]", True),
        ('[{"image": "a.png", "classes": []}]', True),
        ('{"info": {"description": "saccade predict"}}', True),
        ('{"label_names": []}', False),
        ("[1, 2]", False),
        ("text", False),
        ("", False),
    ],
)
def test_json_replaces_nothing_else(tmp_path, content, is_ours):
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content)
    if is_ours:
        predict.check_json(file, [tmp_path / "a.png"])
        return
    with pytest.raises(UserError, match="exists and holds no predictions: choose another name"):
        predict.check_json(file, [tmp_path / "a.png"])


def test_json_over_an_input(command, classifier_run, tmp_path):
    data = save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    for target in (tmp_path / "a.png", tmp_path / "b.png", tmp_path, classifier_run / "config.json"):
        code, _, err = command("predict", classifier_run, tmp_path / "a.png", "--json", target)
        assert code == 2 and err.count("\n") == 1 and "--json" in err
    assert (tmp_path / "a.png").read_bytes() == data


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--top", "-1"], "--top must be 1 or more classes, got -1"),
        (["--top", "0"], "--top must be 1 or more classes, got 0"),
        (["--threshold", "0.5"], "--threshold does not apply to"),
        (["--format", "coco"], "--format coco needs --json FILE"),
        (["--format", "png"], "--format png needs --out FOLDER"),
        (["--format", "png", "--out", "o"], "--format png is for segmenters"),
        (["--format", "coco", "--json", "j.json"], "--format coco is for detectors"),
        (["--out", "o"], "--out needs a task that draws on images"),
        (["--out", "o", "--max-drawn", "0"], "--max-drawn must be 1 or more"),
    ],
)
def test_mistakes(command, classifier_run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png")
    code, _, err = command("predict", classifier_run, tmp_path / "a.png", *arguments)
    assert code == 2 and err.count("\n") == 1 and sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_classes(command, classifier_run, tmp_path):
    """More classes than there are: all of them. Any shape of image."""
    save(tmp_path / "line.png", size=(500, 1))
    code, _, err = command("predict", classifier_run, tmp_path, "--top", 99, "--json", tmp_path / "p.json")
    assert (code, err) == (0, "")
    (record,) = json.loads((tmp_path / "p.json").read_text())
    probabilities = [row["probability"] for row in record["classes"]]
    assert sorted(row["name"] for row in record["classes"]) == list("0123456789")
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    "value, sentence",
    [
        ("50", "from 0 to 1, got 50 (did you mean 0.5?)"),
        ("-0.1", "from 0 to 1, got -0.1"),
        ("nan", "from 0 to 1, got nan"),
        ("inf", "from 0 to 1, got inf"),
    ],
)
def test_thresholds(command, detector_run, tmp_path, value, sentence):
    save(tmp_path / "a.png")
    code, _, err = command("predict", detector_run, tmp_path / "a.png", f"--threshold={value}")
    assert code == 2 and err.count("\n") == 1 and sentence in err


def test_coco_format(command, detector_run, scenes, tmp_path):
    """pycocotools reads it: ids of the images by their files' numbers, of the categories as in the data's json."""
    images = sorted((scenes / "coco/images/test").iterdir())[:2]
    save(tmp_path / "7.png", size=(500, 1)), save(tmp_path / "x.png", size=(1, 300))
    file = tmp_path / "p.json"
    arguments = ("--threshold", 0.0, "--json", file, "--format", "coco")
    assert command("predict", detector_run, *images, tmp_path / "7.png", *arguments)[0] == 0
    truth = json.loads((scenes / "coco/annotations/instances_test.json").read_text())
    coco = COCO(str(file))
    assert coco.dataset["categories"] == truth["categories"] and coco.getImgIds() == [1, 2, 7]
    assert (coco.imgs[7]["width"], coco.imgs[7]["height"]) == (500, 1)
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert annotations and all(one["area"] == coco.annToMask(one).sum() for one in annotations)
    assert all(coco.annToMask(one).shape == (64, 64) and 0 <= one["score"] <= 1 for one in annotations)
    coco.loadRes(coco.dataset["annotations"])  # as a results file too
    # Names that are no numbers: positions. The same file may be written again.
    assert command("predict", detector_run, images[0], tmp_path / "x.png", *arguments)[0] == 0
    assert [image["id"] for image in json.loads(file.read_text())["images"]] == [1, 2]


def test_label_maps(command, segmenter_run, scenes, tmp_path):
    """Grey PNG files with the classes' numbers, equal to the runs of the json."""
    image = scenes / "ade20k/images/test/000001.jpg"
    save(tmp_path / "line.png", size=(300, 1))
    arguments = ("--json", tmp_path / "p.json", "--out", tmp_path / "maps", "--format", "png")
    code, _, err = command("predict", segmenter_run, image, tmp_path / "line.png", *arguments)
    assert (code, err) == (0, "")
    for record, name in zip(json.loads((tmp_path / "p.json").read_text()), ("000001", "line")):
        assert record["written"] == str(tmp_path / f"maps/{name}.png")
        labels = Image.open(record["written"])
        values, lengths = np.array(record["map"]["runs"]).T
        assert labels.mode == "L" and labels.size == Image.open(record["image"]).size
        assert np.array_equal(np.asarray(labels).ravel(), np.repeat(values, lengths))


def test_lines_of_a_list_on_standard_input(command, classifier_run, tmp_path, monkeypatch):
    """A JSON object per image on stdout, as in --json's file; the count, and images that can't be read, on stderr."""
    names = [tmp_path / name for name in ("a b.png", "c.png", "d.png")]
    for i, path in enumerate(names):
        save(path, 60 * i, (20, 20))
    (tmp_path / "bad.png").write_bytes(b"none")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, [*names, "", tmp_path / "bad.png"])) + "\n"))
    file = tmp_path / "found.json"
    arguments = ("--format", "jsonl", "--json", file, "--batch-size", 2)
    code, out, err = command("predict", classifier_run, "-", *arguments)
    assert code == 65 and "bad.png" in err and "3 images: " in err
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in found] == list(map(str, names)) and found == json.loads(file.read_text())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = command("predict", classifier_run, "-")
    assert code == 2 and "standard input holds no images" in err
    code, _, err = command("predict", classifier_run, names[0], "--batch-size", 0)
    assert code == 2 and "--batch-size must be 1 or more images, got 0" in err


def save_video(path, frames: int = 6, size=(32, 24)) -> None:
    av = pytest.importorskip("av", reason="PyAV, which reads videos, is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            image = Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def test_video(command, classifier_run, detector_run, tmp_path, monkeypatch):
    """Each second frame, with its number and time, as the same pictures in files are predicted."""
    clip, out = tmp_path / "clip.mp4", tmp_path / "p.json"
    save_video(clip)
    code, said, err = command("predict", classifier_run, clip, "--every", 2, "--json", out, "--batch-size", 2)
    assert (code, err) == (0, "") and "3 images: " in said
    found = json.loads(out.read_text())
    assert [(row["image"], row["frame"], row["seconds"]) for row in found] == [
        (f"{clip}#000000", 0, 0.0), (f"{clip}#000002", 2, 0.2), (f"{clip}#000004", 4, 0.4),
    ]  # fmt: skip
    for i, frame in enumerate(video.read_frames(clip, 2)):
        assert abs(int(np.asarray(frame.image).mean()) - 80 * i) <= 6
        frame.image.save(tmp_path / f"{i}.png")
    code, _, _ = command(
        "predict", classifier_run, *(tmp_path / f"{i}.png" for i in range(3)), "--json", out, "--batch-size", 2
    )
    assert [row["classes"] for row in json.loads(out.read_text())] == [row["classes"] for row in found]
    code, _, _ = command("predict", detector_run, clip, "--out", tmp_path / "drawn", "--every", 5)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["clip_000000.png", "clip_000005.png"]

    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:200])
    (tmp_path / "text.mkv").write_text("no video")
    code, _, err = command("predict", classifier_run, tmp_path / "cut.mp4", tmp_path / "text.mkv", clip)
    assert code == 65 and "2 of 8 images are left out" in err and "can't be read as a video" in err
    assert (
        command("predict", classifier_run, clip, "--every", 0)[2] == "error: --every must be 1 or more frames, got 0\n"
    )
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = command("predict", classifier_run, clip)
    assert code == 2 and "which needs PyAV: pip install 'saccade[video]'" in err


def test_watch(command, classifier_run, tmp_path):
    """Files that are there, that come, that change; one is written in two parts; Ctrl-C ends it."""
    folder = tmp_path / "inbox"
    (folder / "below").mkdir(parents=True)
    save(folder / "a.png")
    data = save(tmp_path / "b.png")

    def visitor() -> None:
        time.sleep(0.6)
        (folder / "b.png").write_bytes(data[:45])
        time.sleep(0.4)
        (folder / "b.png").write_bytes(data)
        save(folder / "below" / "c.png")
        time.sleep(0.6)
        save(folder / "a.png", size=(40, 40))
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a process started in the background may ignore it
    thread = threading.Thread(target=visitor)
    thread.start()
    watched = ("--watch", folder, "--interval", 0.1)
    code, out, err = command("predict", classifier_run, *watched, "--format", "jsonl", "--json", tmp_path / "p.json")
    thread.join()
    names = [Path(json.loads(line)["image"]).name for line in out.splitlines()]
    assert code == 0 and names[0] == "a.png" and sorted(names) == ["a.png", "a.png", "b.png", "c.png"]
    assert err.startswith("4 images: ") and len(json.loads((tmp_path / "p.json").read_text())) == 4
    assert signal.getsignal(signal.SIGINT) == before

    for arguments, sentence in [
        (("--watch", tmp_path / "none"), "none is not a folder"),
        (("--watch", folder, "--interval", "0"), "--interval must be more than 0 seconds, got 0"),
        ((folder, "--watch", folder), "takes the place of images"),
        (("--watch", folder, "--out", folder / "drawn"), "is inside the watched folder"),
        ((), "give images or folders of them, or --watch FOLDER"),
    ]:
        code, _, err = command("predict", classifier_run, *arguments)
        assert code == 2 and sentence in err


def test_a_file_that_stays_incomplete_is_given_up(tmp_path):
    (tmp_path / "half.png").write_bytes(save(tmp_path / "x.png")[:45])
    (tmp_path / "x.png").unlink()
    groups = predict.new_images(tmp_path, 0.05, patience=0.3)
    start = time.monotonic()
    assert next(groups) == [tmp_path / "half.png"] and time.monotonic() - start > 0.3
    groups.close()
