"""Cascade Mask R-CNN on Agent-Swin-T, 3x, on COCO: box AP 51.4, mask AP 44.5 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/cascade_mask_rcnn_agent_swin_t_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_swin_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="agent_swin_t", drop_path_rate=0.1)
task.update(detector="cascade_mask_rcnn", no_decay=("*norm*", "*.attn.key_*", "*.attn.query_*"))
optimizer.update(filter_bias_and_bn=False)
sync_bn = True
schedule.update(decay_milestones=[197910, 241890])
iterations = 263880
