"""Faster R-CNN on ELA-ResNet-50, 1x, on COCO.

No AP is at hand: the paper trains YOLOF, whose numbers could not be recovered. This is the usual recipe of a
ResNet-50.

torchrun --nproc_per_node=8 tools/train.py configs/coco/faster_rcnn_ela_resnet50_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/ela_resnet50.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="ela_resnet50")
task.update(detector="faster_rcnn")
optimizer = dict(opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4)
schedule.update(warmup_lr=2e-5)
