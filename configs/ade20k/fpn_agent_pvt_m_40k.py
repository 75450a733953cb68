"""Semantic FPN on Agent-PVT-M on ADE20K: mIoU 44.30, mAcc 56.42 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/fpn_agent_pvt_m_40k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/agent_pvt_m.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_fpn import *

model.update(name="agent_pvt_m", drop_path_rate=0.2)
task.update(multiple=1)
schedule = dict(sched="poly", decay_rate=0.9)
iterations = 40000
batch_size = 16
