"""DaViT-T on ImageNet-1K: 82.8 % top-1 expected (arXiv:2204.03645).

Tests keep 95 % of the image, as timm does with these weights, the published code 90 %.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/davit_t.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="davit_t", drop_path_rate=0.1)
schedule.update(cooldown_epochs=10)
clip_grad = 1.0
