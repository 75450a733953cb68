"""DiNAT-iso-Base on ImageNet-1K: 82.1 % top-1 expected (arXiv:2209.15001).

The averaged weights are tested, as published; the better of them and the raw ones are kept.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/dinat_iso_b.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_nat import *

model.update(name="dinat_iso_b", drop_path_rate=0.4)
schedule.update(warmup_epochs=50)
ema = dict(decay=0.9998)
