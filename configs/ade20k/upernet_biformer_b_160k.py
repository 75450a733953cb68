"""UPerNet on BiFormer-B on ADE20K: mIoU 51.0, 51.7 with flips and many scales expected (arXiv:2303.08810).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_biformer_b_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/biformer_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="biformer_b", n_win=8, drop_path_rate=0.4)
task.update(no_decay=("*norm*",))
