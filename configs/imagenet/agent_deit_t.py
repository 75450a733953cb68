"""Agent-DeiT-T on ImageNet-1K: 74.9 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_deit_t.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_deit_t", drop_path_rate=0.0)
optimizer.update(lr=4e-3)
schedule.update(warmup_epochs=20, warmup_lr=4e-6, min_lr=4e-5)
batch_size = 4096
clip_grad = 5.0
