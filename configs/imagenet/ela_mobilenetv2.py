"""ELA-MobileNetV2 on ImageNet-1K: 71.9 % top-1 expected (best of the published logs, which do not name the version).

Learning rate and decay are those of coordinate attention, whose script it is; the paper's flags are not recorded.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/ela_mobilenetv2.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_plain import *

model.update(name="ela_mobilenetv2")
optimizer.update(lr=0.05, weight_decay=4e-5)
epochs = 200
