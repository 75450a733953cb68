"""BiFormer-T on ImageNet-1K: 81.4 % top-1 expected (arXiv:2303.08810).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/biformer_t.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="biformer_t", drop_path_rate=0.1)
repeats = 3
ema = dict(decay=0.99996)
