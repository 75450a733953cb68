"""Cascade Mask R-CNN on NAT-Base, 3x, on COCO: box AP 52.3, mask AP 45.1 expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_nat_b_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/nat_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(name="nat_b", drop_path_rate=0.5)
task.update(detector="cascade_mask_rcnn")
