"""HaloNet-H0 on digits, with blocks of 4 x 4 and a halo of 1.

python tools/train.py configs/digits/halo_h0.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="halo_h0", block=4, halo=1)
optimizer.update(lr=2e-3)
epochs = 16
