"""DiNAT_s-Tiny on ImageNet-1K: 81.8 % top-1 expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/dinats_t.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_nat import *

model.update(name="dinats_t", drop_path_rate=0.2)
