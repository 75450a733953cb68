"""NAT-Base on ImageNet-1K: 84.3 % top-1 expected (arXiv:2204.07143).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/nat_b.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_nat import *

model.update(name="nat_b", drop_path_rate=0.5)
