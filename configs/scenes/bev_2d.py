"""The same lifter with depth switched off, 2D deformable attention, to compare with DFA3D at equal time.

python tools/train.py configs/scenes/bev_2d.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes_bev import *

model.update(lift_depth=False)
epochs = eval_every = 14  # as long as bev_dfa3d.py's 10: a step takes 0.7 of the time
