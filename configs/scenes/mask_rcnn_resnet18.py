"""Mask R-CNN on timm's ResNet-18, on digits on photographs, for comparison.

A step takes five sixths of the time that BiFormer-T's takes, so that there are a fifth more.

python tools/make_scenes.py runs/data/scenes
torchrun --nproc_per_node=2 tools/train.py configs/scenes/mask_rcnn_resnet18.py checkpoint=runs/digits/resnet18
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes import *

model.update(name="resnet18")
iterations = 1200
