"""PATNet-S on ImageNet-1K: 82.1 % top-1 expected (read off a figure of the published code's README).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_s.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_patnet import *

model.update(name="patnet_s", drop_path_rate=0.1)
data.augment.update(auto_augment="rand-m7-mstd0.5-inc1")
task.update(mixup=0.3)
optimizer.update(weight_decay=0.03)
