"""Permutations that are functions of a seed and are evaluated at any positions, for the order of an epoch's images.

Up to STORED images, the permutation is drawn by torch.randperm and stored (4 bytes per image): every permutation is
equally likely. Beyond that, it is computed where it is needed, and takes no memory: a Feistel network whose halves are
digits of a mixed radix, l in [0, a) and r in [0, b) with a * b >= size. Rounds alternate l += F(r) (mod a) and
r += F(l) (mod b), which are invertible, where F hashes its argument with a key of the round (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). Results of size or more are passed through the network again
until they are less (cycle walking): a * b - size < a, about 1 in sqrt(size) of them.
"""

import numpy as np
import torch

from ..runtime.distributed import derive_seed

STORED = 2**24  # the largest size that is stored: 64 MiB, 0.5 s an epoch
ROUNDS = 8


def order_method(size: int) -> str:
    """Return how a permutation of this size is computed: "stored" or "feistel"."""
    return "stored" if size <= STORED else "feistel"


class Stored:
    """torch.randperm as an array."""

    def __init__(self, size: int, seed: int):
        self.values = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy().astype(np.int32)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return self.values[positions].astype(np.int64)


class Feistel:
    """A permutation of 0 … size - 1, size up to 2**62, computed at the positions that are asked for."""

    def __init__(self, size: int, seed: int):
        self.size = size
        a = max(int(np.ceil(np.sqrt(size))), 1)
        self.a, self.b = np.uint64(a), np.uint64(-(-size // a))
        self.keys = [np.uint64(derive_seed("feistel", seed, i)) for i in range(ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the images (N,) int64 at positions (N,), integers in [0, size)."""
        x = self._network(np.asarray(positions).astype(np.uint64))
        while (outside := np.flatnonzero(x >= self.size)).size:
            x[outside] = self._network(x[outside])
        return x.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x // self.b, x % self.b
        for i, key in enumerate(self.keys):
            if i % 2:
                right = (right + _hash(left, key) % self.b) % self.b
            else:
                left = (left + _hash(right, key) % self.a) % self.a
        return left * self.b + right


def permutation(size: int, seed: int) -> Stored | Feistel:
    """Return the permutation of 0 … size - 1 that the seed determines, a function of positions (N,)."""
    return (Stored if order_method(size) == "stored" else Feistel)(size, seed)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return 64 pseudo-random bits of (x, key): two rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014)."""
    for added in (key, np.uint64(0x9E3779B97F4A7C15)):
        x = x + added
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x
