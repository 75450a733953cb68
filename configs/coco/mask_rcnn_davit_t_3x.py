"""Mask R-CNN on DaViT-T, 3x, on COCO: box AP 47.4, mask AP 42.9 expected (arXiv:2204.03645).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_davit_t_3x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_t", drop_path_rate=0.2)
optimizer.update(filter_bias_and_bn=False)
schedule.update(decay_milestones=[197910, 241890])
iterations = 263880
