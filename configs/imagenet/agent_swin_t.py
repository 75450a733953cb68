"""Agent-Swin-T on ImageNet-1K: 82.6 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_swin_t.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_swin_t", drop_path_rate=0.2)
optimizer.update(lr=1e-3)
schedule.update(warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5)
clip_grad = 5.0
