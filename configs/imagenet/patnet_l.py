"""PATNet-L on ImageNet-1K: 83.9 % top-1 expected (read off a figure of the published code's README).

The figure swaps the labels M and L, which are read here by size.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_l.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_patnet import *

model.update(name="patnet_l", drop_path_rate=0.3)
data.augment.update(auto_augment="rand-m7-mstd0.5-inc1")
task.update(mixup=0.7)
optimizer.update(lr=2e-3, weight_decay=0.05)
batch_size = 2048
clip_grad = 0.01
