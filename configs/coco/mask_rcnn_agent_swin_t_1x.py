"""Mask R-CNN on Agent-Swin-T, 1x, on COCO: box AP 44.6, mask AP 40.7 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_agent_swin_t_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_swin_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="agent_swin_t", drop_path_rate=0.1)
task.update(no_decay=("*norm*", "*.attn.key_*", "*.attn.query_*"))
optimizer.update(filter_bias_and_bn=False)
