"""Mask R-CNN on PATNet-S, 1x, on COCO.

No AP is known. The published configs build a network of other widths (FasterNet's), this one has the classifier's.

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_patnet_s_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/patnet_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="patnet_s", drop_path_rate=0.15)
optimizer.update(lr=2e-4, weight_decay=1e-4, filter_bias_and_bn=False)
schedule.update(warmup_lr=2e-7)
