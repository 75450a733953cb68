"""UPerNet on DiNAT_s-Tiny on ADE20K: mIoU 46.0, 47.4 with flips and scales, expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_dinats_t_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/dinats_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(
    name="dinats_t",
    drop_path_rate=0.3,
    dilations=((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
)
task.update(no_decay=("*norm*", "*rpb*"))
