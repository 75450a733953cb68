"""Arrays in files that are mapped into memory: opened at once, however large; only the pages that are read are loaded.

The pages belong to the system's file cache, which the processes of a machine share and which gives way to other memory.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

KEPT = 1000  # reads, each of up to 64 KiB of pages, after which a process lets go of the pages that it has mapped


class Mapped:
    """A one-dimensional array in a raw file of a dtype, read-only. Pickled as the file's name."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype, self.reads = path, np.dtype(dtype), 0
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        if self.map is not None and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_RANDOM)
        self.array = np.frombuffer(self.map or b"", self.dtype)

    def __reduce__(self) -> tuple:
        return Mapped, (self.path, self.dtype.str)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        if self.reads % KEPT == 0 and self.map is not None and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)  # they stay in the system's cache
        return self.array[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)
