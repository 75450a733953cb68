"""Faster R-CNN on ELA-ResNet-50, 1x, on COCO.

No AP is known: the paper trains YOLOF, which is not here and whose numbers could not be recovered. The recipe is
mmdetection's for a ResNet-50: the stem and the first stage are frozen, and all BatchNorms of the backbone keep their
statistics.

torchrun --nproc_per_node=8 tools/train.py configs/coco/faster_rcnn_ela_resnet50_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/ela_resnet50.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="ela_resnet50")
task.update(detector="faster_rcnn", norm_eval=True)
freeze = 1
optimizer = dict(opt="momentum", lr=0.02, momentum=0.9, weight_decay=1e-4, filter_bias_and_bn=False)
schedule.update(warmup_lr=2e-5)
