"""UPerNet on BiFormer-S on ADE20K: mIoU 49.8, 50.8 with flips and many scales expected (arXiv:2303.08810).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_biformer_s_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/biformer_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="biformer_s", n_win=8, drop_path_rate=0.3)
task.update(no_decay=("*norm*",))
