"""Mutants of files and of JSON values, from fixed seeds."""

import copy
import random
from typing import Any

# Values that no reader may take for what it expects.
ODD = [None, True, -1, 0, 1.5, 1e308, float("nan"), 2**70, "", "x", "\x00", "\ud800", [], [[]], {}, {"a": 1}, "9" * 999]


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with one to eight changes: bits, runs, cuts, repeats, swaps, other ends."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(data) or 1)
        length = chance.choice([1, 2, 4, 16, 256])
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + length] = bytes(chance.choice([0, 0xFF, 0x7F]) for _ in range(length))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * chance.choice([1, 10])
        elif kind == 5:
            number = chance.choice([2**31 - 1, 2**32 - 1, 65535, 0])
            data[at : at + 4] = number.to_bytes(4, chance.choice(["big", "little"]))
        else:
            data[at : at + length] = chance.randbytes(length)
    return bytes(data)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value in which one to three parts are replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        parent, key = _pick(value, chance)
        if parent is None:
            return chance.choice(ODD)
        kind = chance.randrange(4)
        if kind == 0 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 0:
            parent[f"{key}x"] = parent.pop(key)
        elif kind == 1:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD))
    return value


def _pick(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a container inside a value, and one of its keys; (None, None) where it holds none."""
    parent = key = None
    while isinstance(value, (dict, list)) and value and (parent is None or chance.random() < 0.8):
        parent, key = value, chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[key]
    return parent, key
