"""Mask R-CNN on DaViT-B, 1x, on COCO: box AP 48.2, mask AP 43.3 expected (arXiv:2204.03645).

The drop path is ours: only the configs of DaViT-T are published.

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_davit_b_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_b", drop_path_rate=0.3)
optimizer.update(filter_bias_and_bn=False)
