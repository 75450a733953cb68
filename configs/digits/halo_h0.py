"""HaloNet-H0 with eight blocks on digits: 99.4 % top-1 on the test split (one seed) after five minutes on two busy CPU
cores.

python tools/train.py configs/digits/halo_h0.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="halo_h0", blocks=("AA", "AA", "AA", "AA"), block=4, halo=1)
optimizer.update(lr=2e-3)
epochs = 20
