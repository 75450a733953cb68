"""Cascade Mask R-CNN on DiNAT_s-Base, 3x, on COCO: box AP 52.6, mask AP 45.3 expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_dinats_b_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/dinats_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(
    name="dinats_b",
    drop_path_rate=0.6,
    dilations=((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
)
task.update(detector="cascade_mask_rcnn")
optimizer.update(lr=7.5e-05)
schedule.update(warmup_lr=7.5e-08)
