"""Cascade Mask R-CNN on NAT-Mini, 3x, on COCO: box AP 50.3, mask AP 43.6 expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_nat_m_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/nat_m.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(name="nat_m", drop_path_rate=0.2)
task.update(detector="cascade_mask_rcnn")
