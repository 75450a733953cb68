"""Cascade Mask R-CNN on DiNAT_s-Small, 3x, on COCO: box AP 52.3, mask AP 45.2 expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_dinats_s_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/dinats_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(
    name="dinats_s",
    drop_path_rate=0.5,
    dilations=((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
)
task.update(detector="cascade_mask_rcnn")
