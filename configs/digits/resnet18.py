"""timm's ResNet-18 on digits, for comparison: 99.7 % top-1 on the test split.

python tools/train.py configs/digits/resnet18.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="resnet18")
