"""Agent-PVT-M at 256 pixels on ImageNet-1K: 83.8 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_pvt_m_256.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_pvt_m.untrained_256", drop_path_rate=0.3)
optimizer.update(lr=5e-4)
schedule.update(warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
batch_size = 512
clip_grad = 1.0
