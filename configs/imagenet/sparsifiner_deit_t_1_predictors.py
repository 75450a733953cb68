"""Sparsifiner-DeiT-T, first phase: the mask predictors learn the attention of the dense parent; ImageNet-1K.

The parent is DeiT-T (72.2 % top-1), published or timm's.
The recipe is DeiT-S's, the one that is published.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/sparsifiner_deit_t_1_predictors.py checkpoint=parent.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_sparsifiner import *

model.update(name="sparsifiner_deit_t")
