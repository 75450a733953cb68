"""Agent-CSwin-B on ImageNet-1K: 84.7 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_cswin_b.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_cswin_b", drop_path_rate=0.5)
optimizer.update(lr=5e-4, weight_decay=0.1)
schedule.update(warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
batch_size = 512
ema = dict(decay=0.99992)
