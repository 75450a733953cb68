"""Frames of a video file, by PyAV."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..runtime.errors import UserError
from .bad_images import BadImage

ENDINGS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


class Frame(NamedTuple):
    """A frame of a video. number: from 0. seconds: from the start, as the file says; None where it does not."""

    number: int
    seconds: float | None
    image: Image.Image


def is_video(path: Path) -> bool:
    """Tell by a file's name whether it is a video."""
    return path.suffix.lower() in ENDINGS


def read_frames(path: Path, every: int = 1) -> Iterator[Frame]:
    """Yield each `every`-th frame of a video as an RGB image, upright as a player shows it.

    Raises UserError where PyAV is missing, and BadImage where the file can't be read or ends before it should, after
    the frames before.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path} is a video, which needs PyAV: pip install 'saccade[video]'") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadImage(str(path), "has no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                if number % every == 0:
                    image = frame.to_image().rotate(frame.rotation, expand=True)
                    yield Frame(number, None if frame.time is None else round(frame.time, 6), image)
            if number < 0:
                raise BadImage(str(path), "has no frames")
            if number + 1 < stream.frames:
                raise BadImage(str(path), f"is incomplete: it has {number + 1} of {stream.frames} frames")
    except av.error.FFmpegError as error:
        raise BadImage(str(path), f"can't be read as a video ({error.strerror or error})") from error
