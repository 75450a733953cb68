"""HaloNet-H5 on ImageNet-1K: 84.0 % top-1 expected (arXiv:2103.12731).

Length, batch, smoothing and the kinds of augmentation are the paper's; the optimizer, its rate and decay, and the
strengths of RandAugment and stochastic depth are ours: the paper's are not known.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/halo_h5.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_halonet import *

model.update(name="halo_h5", drop_path_rate=0.25)
