"""UPerNet on NAT-Mini on ADE20K: mIoU 45.1, 46.4 with flips and scales, expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_nat_m_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/nat_m.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="nat_m", drop_path_rate=0.2)
task.update(no_decay=("*norm*", "*rpb*"))
