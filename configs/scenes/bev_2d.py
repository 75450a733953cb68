"""The same lifter with depth switched off, 2D deformable attention, to compare with DFA3D at equal steps.

python tools/train.py configs/scenes/bev_2d.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes_bev import *

model.update(lift_depth=False)
