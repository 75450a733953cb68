"""RetinaNet on BiFormer-S, 1x, on COCO: box AP 45.9 expected (arXiv:2303.08810).

The authors' own second run gave 47.3.

torchrun --nproc_per_node=8 tools/train.py configs/coco/retinanet_biformer_s_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/biformer_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="biformer_s", drop_path_rate=0.2, n_win=16, topks=(1, 4, 16, -2))
task.update(detector="retinanet", norm_eval=True)
optimizer.update(weight_decay=1e-4, filter_bias_and_bn=False)
