"""PATNet-T2 on ImageNet-1K: 80.2 % top-1 expected (read off a figure of the published code's README).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_t2.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_patnet import *

model.update(name="patnet_t2", drop_path_rate=0.05)
data.augment.update(auto_augment="rand-m5-mstd0.5-inc1")
task.update(mixup=0.1)
optimizer.update(weight_decay=0.02)
