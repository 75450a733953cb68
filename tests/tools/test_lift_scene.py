"""tools/lift_scene.py lifts a scene's colours to where they are."""

import importlib
from pathlib import Path

import numpy as np
import torch
from saccade.train.data.bev_scenes import BevScenes

TOOLS = Path(__file__).parents[2] / "tools"


def test_lifts_colours_to_their_place(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("lift_scene")
    monkeypatch.setattr(tool, "SIZE", (56, 100))
    monkeypatch.setattr(tool, "CELL", 0.5)
    frame = BevScenes(img_size=(56, 100), radius=12.0).world("test", 5).frame(0.0, (56, 100))
    # the left half of every image red, the right half green: each camera's left is anticlockwise of its axis
    frame.images[:, :, :50], frame.images[:, :, 50:] = (255, 0, 0), (0, 255, 0)
    above = tool.lift_colours(frame)
    assert above.shape == (48, 48, 3)
    assert torch.equal(above[22:26, 22:26], torch.ones(4, 4, 3))  # no camera sees the ground under the ego
    rows, columns = np.mgrid[:48, :48]
    x, y = (columns - 23.5) * 0.5, (23.5 - rows) * 0.5  # metres to the right and ahead
    ahead = (y > 3) & (np.abs(x) < 0.4 * y) & (np.hypot(x, y) < 8)
    seen = torch.from_numpy(ahead) & (above[..., 2] == 0)
    left, right = (above[seen & torch.from_numpy(side)] for side in (x < -0.5, x > 0.5))
    assert len(left) > 20 and len(right) > 20
    assert torch.equal(left, torch.tensor([1.0, 0, 0]).expand_as(left))
    assert torch.equal(right, torch.tensor([0, 1.0, 0]).expand_as(right))
