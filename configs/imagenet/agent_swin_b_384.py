"""Agent-Swin-B at 384 pixels on ImageNet-1K: 84.9 % top-1 expected (README of the published code).

It starts from the weights at 224 pixels: those of configs/imagenet/agent_swin_b.py, or checkpoint=FILE.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/agent_swin_b_384.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="agent_swin_b.untrained_384", drop_path_rate=0.5)
optimizer.update(lr=1e-5, weight_decay=1e-8)
schedule.update(warmup_lr=1e-8, min_lr=1e-7)
epochs = 30
batch_size = 256
clip_grad = 5.0
checkpoint = "runs/imagenet/agent_swin_b"
