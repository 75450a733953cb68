"""BiFormer-STL in NCHW layout on ImageNet-1K: 82.7 % top-1 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/biformer_stl_nchw.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet import *

model.update(name="biformer_stl_nchw", drop_path_rate=0.1)
repeats = 3
ema = dict(decay=0.99996)
