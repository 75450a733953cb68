"""PATNet-T0 on ImageNet-1K: 73.9 % top-1 expected (read off a figure of the published code's README).

The rates are those of the published file's comments, for this batch; as published it would meet a batch of 256.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/patnet_t0.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="patnet_t0", drop_path_rate=0.0)
data.update(sizes={0: 192, 280: 224}, augment=dict(auto_augment=None, color_jitter=0.0))
task.update(mixup=0.05)
optimizer.update(lr=4e-3, weight_decay=5e-3)
schedule.update(warmup_epochs=20)
batch_size = 4096
