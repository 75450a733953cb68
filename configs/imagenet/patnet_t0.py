"""PATNet-T0 on ImageNet-1K: 73.9 % top-1 expected (read off a figure of the published code's README).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_t0.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_patnet import *

model.update(name="patnet_t0", drop_path_rate=0.0)
