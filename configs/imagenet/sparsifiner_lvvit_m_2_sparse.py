"""Sparsifiner-LV-ViT-M, second phase: the model learns to attend to a quarter of the keys; ImageNet-1K.

At most 0.4 points below the parent, LV-ViT-M (84.0 % top-1), are expected (arXiv:2303.13755).
The recipe is DeiT-S's: none is published for LV-ViT, whose M the published script does not build.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/sparsifiner_lvvit_m_2_sparse.py task.teacher=parent.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_sparsifiner import *

model.update(name="sparsifiner_lvvit_m")
task.update(phase="sparse", teacher="parent.pth")
optimizer.update(lr=8e-5)
schedule.update(min_lr=2e-6)
epochs = 42
checkpoint = "runs/imagenet/sparsifiner_lvvit_m_1_predictors"
