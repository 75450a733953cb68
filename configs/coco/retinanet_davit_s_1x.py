"""RetinaNet on DaViT-S, 1x, on COCO: box AP 46.0 expected (arXiv:2204.03645).

The drop path is ours: only the configs of DaViT-T are published.

torchrun --nproc_per_node=8 tools/train.py configs/coco/retinanet_davit_s_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/davit_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco_multiscale import *

model.update(name="davit_s", drop_path_rate=0.2)
task.update(detector="retinanet")
optimizer.update(filter_bias_and_bn=False)
