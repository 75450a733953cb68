"""ULSAM-MobileNet-V2 f on ImageNet-1K: 69.72 % top-1 expected (poster of the published code, 4 subspaces).

The paper's recipe is plain; its rate, schedule, decay and length are not known, these are MobileNet's usual ones.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/ulsam_mobilenet_v2_f.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_plain import *

model.update(name="ulsam_mobilenet_v2_f")
