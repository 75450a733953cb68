"""The pixels of a crop of a JPEG, without those of the rest: libjpeg-turbo's TurboJPEG API 3, called by ctypes.

Entropy decoding, two thirds of the time of decoding a photograph, has to go through the rows above the crop too.
Inverse transforms, upsampling and conversion of colours are left out where the crop does not need them, and rows below
it are not read at all.

The library is looked for in Python's environment (conda), in the system, and in the wheel of the package turbojpeg, of
which nothing else is used. Source: libjpeg-turbo's doc/html/group___turbo_j_p_e_g.html.
"""

import ctypes
import ctypes.util
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.errors import UserError

_DECOMPRESS = 1  # TJINIT
_SUBSAMPLING, _WIDTH, _HEIGHT, _COLORSPACE = 4, 5, 6, 8  # TJPARAM
_RGB = 0  # TJPF
_COLORS = (0, 1, 2)  # TJCS: RGB, YCbCr, GRAY; of CMYK and YCCK, decoders make different RGB
# Width of an iMCU for each TJSAMP: 4:4:4, 4:2:2, 4:2:0 and greyscale. Others are upsampled differently by versions of
# the library.
_IMCU = {0: 8, 1: 16, 2: 16, 3: 8}


class _Region(ctypes.Structure):
    """tjregion: left, top, width and height in pixels."""

    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


def is_installed() -> bool:
    """Tell whether libjpeg-turbo 3 can be loaded."""
    return _library() is not None


def require() -> None:
    """Raise UserError where libjpeg-turbo 3 is not installed."""
    if not is_installed():
        raise UserError(
            "data.decode=cropped needs libjpeg-turbo 3, which is not installed: pip install 'saccade[jpeg]', or take "
            "conda's or the system's package"
        )


class Jpeg:
    """An opened JPEG, of height × width pixels, until this thread opens the next one."""

    def __init__(self, data: bytes):
        """Read the header. Raises ValueError for what is left to other decoders: damaged files and rare kinds."""
        self._data, self._api, self._handle = data, _library(), _handle()
        if self._api.tj3DecompressHeader(self._handle, data, len(data)):
            raise ValueError("not a JPEG")
        self.height, self.width = (self._api.tj3Get(self._handle, key) for key in (_HEIGHT, _WIDTH))
        self._imcu = _IMCU.get(self._api.tj3Get(self._handle, _SUBSAMPLING))
        if self._imcu is None or self._api.tj3Get(self._handle, _COLORSPACE) not in _COLORS:
            raise ValueError("a rare kind of JPEG")

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Decode a part to uint8 (height, width, 3), RGB, as a part of the whole decoded image.

        Raises ValueError where the data are damaged.
        """
        # Upsampled chroma depends on the neighbours of the crop's edge. A region begins at a multiple of an iMCU.
        x, y = max(left - 1, 0) // self._imcu * self._imcu, max(top - 1, 0)
        right, bottom = min(left + width + 1, self.width), min(top + height + 1, self.height)
        pixels = torch.empty(bottom - y, right - x, 3, dtype=torch.uint8)
        region = _Region(x, y, right - x, bottom - y)
        if self._api.tj3SetCroppingRegion(self._handle, region) or self._api.tj3Decompress8(
            self._handle, self._data, len(self._data), pixels.data_ptr(), 0, _RGB
        ):
            raise ValueError("damaged")
        return pixels[top - y : top - y + height, left - x : left - x + width]


@lru_cache
def _library() -> ctypes.CDLL | None:
    """Load the library; None where there is none of version 3 or later, which alone has the functions used here."""
    for name in _candidates():
        try:
            api = ctypes.CDLL(name)
            pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
            api.tj3Init.restype, api.tj3Init.argtypes = pointer, [number]
            api.tj3Get.argtypes = [pointer, number]
            api.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
            api.tj3SetCroppingRegion.argtypes = [pointer, _Region]
            api.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, size, pointer, number, number]
            return api
        except (OSError, AttributeError):
            continue
    return None


def _candidates() -> Iterator[str]:
    """Yield file names under which the library may be loaded."""
    for folder, pattern in (("lib", "libturbojpeg.*"), ("Library/bin", "turbojpeg.dll")):
        yield from map(str, sorted(Path(sys.prefix, folder).glob(pattern)))
    if found := ctypes.util.find_library("turbojpeg"):
        yield found
    try:
        inside = files("turbojpeg") or []
    except PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in inside if file.match("libturbojpeg*") or file.suffix == ".dll")


_threads = threading.local()


def _handle() -> int:
    """Return this thread's decompressor. A process that is forked has a copy of its own."""
    if not hasattr(_threads, "handle"):
        _threads.handle = _library().tj3Init(_DECOMPRESS)
    return _threads.handle
