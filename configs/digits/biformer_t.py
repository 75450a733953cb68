"""BiFormer-T on digits.

python tools/train.py configs/digits/biformer_t.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="biformer_t", n_win=2, topks=(1, 2, 4, -2))
