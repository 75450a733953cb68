"""Mask R-CNN on NAT-Tiny, 3x, on COCO: box AP 47.7, mask AP 42.6 expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_nat_t_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/nat_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(name="nat_t", drop_path_rate=0.2)
