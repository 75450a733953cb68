"""BiFormer-S on ImageNet-1K: 83.8 % top-1 expected (arXiv:2303.08810).

Batch and rate are those of the published README, one node; its training script has two, 2,048 images and 2e-3.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/biformer_s.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="biformer_s", drop_path_rate=0.15)
repeats = 3
ema = dict(decay=0.99996)
