"""UPerNet on DiNAT_s-Large on ADE20K: mIoU 53.4, 54.6 with flips and scales, expected (arXiv:2209.15001, ImageNet-22K).

Crops are of 640 pixels, as the dilations are for.

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_dinats_l_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/dinats_l.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(
    name="dinats_l",
    drop_path_rate=0.3,
    dilations=((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
)
task.update(no_decay=("*norm*", "*rpb*"))
data.update(scale=(2560, 640), crop=640)
