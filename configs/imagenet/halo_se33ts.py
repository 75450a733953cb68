"""HaloNet-SE-33ts on ImageNet-1K: 81.0 % top-1 expected (timm's results for its weights).

Procedure A1 of ResNet Strikes Back (arXiv:2110.00476), which is not timm's: tag ra2 is RMSProp, averaged weights and
a rate that decays in steps, whose values for this model are not published.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/halo_se33ts.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_rsb import *

model.update(name="halo_se33ts", drop_path_rate=0.05)
