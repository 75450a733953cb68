"""Agent-CSwin-S on ImageNet-1K: 83.9 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_cswin_s.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_cswin_s", drop_path_rate=0.4)
optimizer.update(lr=1e-3)
schedule.update(warmup_epochs=20, warmup_lr=2e-6, min_lr=2e-5, cooldown_epochs=10)
ema = dict(decay=0.99984)
