"""Cascade Mask R-CNN on DiNAT-Large, 3x, on COCO: box AP 55.3, mask AP 47.8 expected
(arXiv:2209.15001, pre-trained on ImageNet-22K).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_dinat_l_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/dinat_l.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_nat import *

model.update(
    name="dinat_l",
    drop_path_rate=0.6,
    dilations=((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
)
task.update(detector="cascade_mask_rcnn")
optimizer.update(lr=7.5e-05)
schedule.update(warmup_lr=7.5e-08)
