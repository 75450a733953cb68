"""Semantic FPN on BiFormer-B on ADE20K: mIoU 49.9 expected (arXiv:2303.08810).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/fpn_biformer_b_80k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/biformer_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_fpn import *

model.update(name="biformer_b", n_win=8, out_norms=True, drop_path_rate=0.3)
