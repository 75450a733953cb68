"""Mask R-CNN on BiFormer-B, 1x, on COCO: box AP 48.6, mask AP 43.7 expected (arXiv:2303.08810).

torchrun --nproc_per_node=8 tools/train.py configs/coco/mask_rcnn_biformer_b_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/biformer_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="biformer_b", drop_path_rate=0.3, n_win=16, topks=(1, 4, 16, -2))
task.update(norm_eval=True, no_decay=("*norm*",))
optimizer.update(filter_bias_and_bn=False)
