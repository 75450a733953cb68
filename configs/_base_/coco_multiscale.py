"""COCO 2017 with the augmentation of DETR, 12 epochs of 7,330 steps ("1x"), 16 pictures a step.

A picture's shorter side becomes 480 to 800 pixels, its longer one 1333 at most; half the pictures are cut before that.
3x is iterations = 263880 with milestones at 197910 and 241890. The papers train in fp16 where they say so; bf16 needs
no loss scaling and runs on CPUs too. checkpoint=…: the backbone's weights, a classifier's on ImageNet-1K.
"""

from mmengine.config import read_base

with read_base():
    from .coco import *

model.update(name="davit_t")
data.update(short=tuple(range(480, 801, 32)), crop=dict(short=(400, 500, 600), side=(384, 600)))
