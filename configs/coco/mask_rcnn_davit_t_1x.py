"""Mask R-CNN on DaViT-T, 1x, on COCO: box AP 45.0, mask AP 41.1 expected (arXiv:2204.03645).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_davit_t_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_t", drop_path_rate=0.1)
optimizer.update(filter_bias_and_bn=False)
