"""Mask R-CNN on Agent-PVT-L, 1x, on COCO: box AP 46.9, mask AP 42.8 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_agent_pvt_l_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_pvt_l.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="agent_pvt_l", drop_path_rate=0.2)
optimizer.update(lr=2e-4, weight_decay=1e-4, filter_bias_and_bn=False)
schedule.update(warmup_lr=2e-7)
