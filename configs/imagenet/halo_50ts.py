"""HaloNet-50ts on ImageNet-1K: 81.6 % top-1 expected (timm's results for its weights).

Procedure A1 of ResNet Strikes Back (arXiv:2110.00476). timm's run has stronger dropout, stochastic depth and
RandAugment, by amounts that are not published.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/halo_50ts.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_rsb import *

model.update(name="halo_50ts", drop_path_rate=0.05)
