"""BiFormer-B on ImageNet-1K: 84.3 % top-1 expected (arXiv:2303.08810).

The drop path is the paper's as remembered: it could not be confirmed.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/biformer_b.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="biformer_b", drop_path_rate=0.4)
repeats = 3
ema = dict(decay=0.99996)
