"""Mask R-CNN on Agent-Swin-S, 1x, on COCO: box AP 47.2, mask AP 42.7 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_agent_swin_s_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_swin_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="agent_swin_s", drop_path_rate=0.1)
task.update(no_decay=("*norm*", "*.attn.key_*", "*.attn.query_*"))
optimizer.update(filter_bias_and_bn=False)
