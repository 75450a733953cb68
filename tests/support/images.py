"""Deterministic synthetic images, the inputs of the recorded detectors and segmenters."""

import numpy as np
import torch


def coarse_image(seed: int, height: int, width: int) -> torch.Tensor:
    """Return a uint8 RGB image (3, height, width): squares of 16 pixels with noise."""
    generator = np.random.Generator(np.random.PCG64(seed))
    squares = generator.integers(0, 256, (-(-height // 16), -(-width // 16), 3))
    noise = generator.integers(-40, 41, (height, width, 3))
    large = np.kron(squares, np.ones((16, 16, 1), dtype=np.int64))[:height, :width]
    return torch.from_numpy(np.clip(large + noise, 0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
