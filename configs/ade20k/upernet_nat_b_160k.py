"""UPerNet on NAT-Base on ADE20K: mIoU 48.5, 49.7 with flips and scales, expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_nat_b_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/nat_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="nat_b", drop_path_rate=0.5)
task.update(no_decay=("*norm*", "*rpb*"))
