"""DaViT-T on digits, with windows of 4 x 4.

python tools/train.py configs/digits/davit_t.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="davit_t", window_size=4)
optimizer.update(lr=2e-3)
epochs = 16
