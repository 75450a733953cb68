"""PATNet-T1 on ImageNet-1K: 78.1 % top-1 expected (read off a figure of the published code's README).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_t1.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_patnet import *

model.update(name="patnet_t1", drop_path_rate=0.02)
data.augment.update(auto_augment="rand-m3-mstd0.5-inc1")
task.update(mixup=0.1)
optimizer.update(weight_decay=0.01)
