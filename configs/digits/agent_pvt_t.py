"""Agent-PVT-T on digits: 98 % top-1 on the test split (one seed) after four minutes on two busy CPU cores.

python tools/train.py configs/digits/agent_pvt_t.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="agent_pvt_t", img_size=32, agents=(9, 4, 4, 1))
optimizer.update(lr=2e-3)
epochs = 16
