"""UPerNet on DiNAT-Tiny on ADE20K: mIoU 47.8, 48.8 with flips and scales, expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_dinat_t_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/dinat_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(
    name="dinat_t",
    drop_path_rate=0.3,
    dilations=((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
)
task.update(no_decay=("*norm*", "*rpb*"))
