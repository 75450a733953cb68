"""Agent-Swin-S at 288 pixels on ImageNet-1K: 84.1 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_swin_s_288.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_swin_s.untrained_288", drop_path_rate=0.3)
optimizer.update(lr=5e-4)
schedule.update(warmup_epochs=20, warmup_lr=5e-7, min_lr=5e-6)
batch_size = 512
clip_grad = 5.0
