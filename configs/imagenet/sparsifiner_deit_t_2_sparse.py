"""Sparsifiner-DeiT-T, second phase: the model learns to attend to a quarter of the keys; ImageNet-1K.

The parent is DeiT-T (72.2 % top-1); no accuracy is published for this size.
The recipe is DeiT-S's, the one that is published.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/sparsifiner_deit_t_2_sparse.py task.teacher=parent.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_sparsifiner import *

model.update(name="sparsifiner_deit_t")
task.update(phase="sparse", teacher="parent.pth")
optimizer.update(lr=8e-5)
schedule.update(min_lr=2e-6)
epochs = 42
checkpoint = "runs/imagenet/sparsifiner_deit_t_1_predictors"
