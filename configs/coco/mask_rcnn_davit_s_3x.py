"""Mask R-CNN on DaViT-S, 3x, on COCO: box AP 49.5, mask AP 44.3 expected (arXiv:2204.03645).

The drop path is ours: only the configs of DaViT-T are published.

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_davit_s_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_s", drop_path_rate=0.3)
optimizer.update(filter_bias_and_bn=False)
schedule.update(decay_milestones=[197910, 241890])
iterations = 263880
