"""Agent-PVT-S on ImageNet-1K: 82.2 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_pvt_s.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_pvt_s", drop_path_rate=0.1)
optimizer.update(lr=1e-3)
schedule.update(warmup_lr=2e-6, min_lr=2e-5, cooldown_epochs=10)
