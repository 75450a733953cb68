"""Agent-CSwin-B at 384 pixels on ImageNet-1K: 85.8 % top-1 expected (README of the published code).

It starts from the weights at 224 pixels: those of configs/imagenet/agent_cswin_b.py, or checkpoint=FILE.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_cswin_b_384.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_cswin_b.untrained_384", drop_path_rate=0.7)
optimizer.update(lr=2.5e-6, weight_decay=1e-8)
schedule.update(warmup_epochs=0, warmup_lr=2.5e-6, min_lr=2.5e-7, cooldown_epochs=10)
epochs = 20
batch_size = 256
ema = dict(decay=0.9998)
checkpoint = "runs/imagenet/agent_cswin_b"
