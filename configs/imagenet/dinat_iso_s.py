"""DiNAT-iso-Small on ImageNet-1K: 80.8 % top-1 expected (arXiv:2209.15001).

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/dinat_iso_s.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_nat import *

model.update(name="dinat_iso_s", drop_path_rate=0.1)
