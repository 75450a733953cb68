"""Reader of the golden fixtures under tests/fixtures: what a published model computes after a deterministic filling.

A fixture lists every entry of the published state dict (key, kind, shape) and summaries of outputs and of gradients in
float64. `weights` rebuilds the state dict, `seeded` the input, `assert_equal` and `assert_gradients` compare.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures"


def load(system: str, name: str) -> dict:
    return json.loads((FIXTURES / system / f"{name}.json").read_text())


def seeded(seed: int, shape) -> Tensor:
    """Return standard normal float64 values of `shape` from NumPy's PCG64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape)))


def weights(fixture: dict) -> dict[str, Tensor]:
    """Return the state dict: each entry drawn from a generator seeded by its key's CRC-32, scaled by its role."""
    state = {}
    for key, kind, shape in fixture["state"]:
        z = seeded(zlib.crc32(key.encode()), shape)
        is_weight = key.endswith("weight")
        if kind == "running_mean":
            state[key] = 0.1 * z
        elif kind == "running_var":
            state[key] = 1 + 0.25 * z.abs()
        elif kind == "param" and len(shape) >= 2:
            state[key] = z / math.sqrt(math.prod(shape[1:])) if is_weight else 0.2 * z
        elif kind == "param":
            state[key] = 1 + 0.1 * z if is_weight else 0.1 * z
    return state


def load_file(tmp_path: Path, content: dict, name: str, **kwargs) -> nn.Module:
    """Create our model with `content` as its weight file, loaded as a user loads a published one."""
    file = tmp_path / "published.pth"
    torch.save(content, file)
    overlay = dict(file=str(file), num_classes=kwargs.get("num_classes", 1000))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def image(fixture: dict) -> Tensor:
    return seeded(fixture["input"]["seed"], fixture["input"]["shape"])


def assert_equal(name: str, got: Tensor, want: dict, rtol: float = 1e-9) -> None:
    """Check shape, mean, std, norm and samples against the recorded ones, relative to the recorded root mean square."""
    assert list(got.shape) == want["shape"], name
    flat = got.detach().double().flatten()
    rms = want["l2"] / math.sqrt(max(1, flat.numel()))
    tolerance = rtol * rms + 1e-12 * rtol
    for stat, value in (
        ("mean", flat.mean()),
        ("std", flat.std(correction=0)),
        ("l2", flat.norm() / flat.numel() ** 0.5),
    ):
        expected = rms if stat == "l2" else want[stat]
        assert abs(value.item() - expected) <= tolerance, f"{name}: {stat} {value.item()!r}, expected {expected!r}"
    for i, expected in want["samples"]:
        assert abs(flat[i].item() - expected) <= 10 * tolerance, (
            f"{name}[{i}]: {flat[i].item()!r}, expected {expected!r}"
        )


def assert_gradients(model, want: dict, rename, rtol: float = 1e-7) -> None:
    """Check the norms of the parameters' gradients; `rename` maps published keys to ours."""
    params = dict(model.named_parameters())
    largest = max(v for v in want.values() if v is not None)
    assert {rename(k) for k in want} == set(params)
    for key, expected in want.items():
        grad = params[rename(key)].grad
        if expected is None:
            assert grad is None or not grad.any(), key
        else:
            assert abs(grad.norm().item() - expected) <= rtol * max(expected, 1e-6 * largest), key
