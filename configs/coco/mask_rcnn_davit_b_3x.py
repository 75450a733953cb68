"""Mask R-CNN on DaViT-B, 3x, on COCO: box AP 49.9, mask AP 44.6 expected (arXiv:2204.03645).

The drop path is ours: only the configs of DaViT-T are published.

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_davit_b_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_b", drop_path_rate=0.4)
optimizer.update(filter_bias_and_bn=False)
schedule.update(decay_milestones=[197910, 241890])
iterations = 263880
