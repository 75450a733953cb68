"""ELA-ResNet-18; ImageNet-1K.

0.93 points above ResNet-18 are expected (arXiv:2403.01123); the recipe is ResNet's, the paper's flags are not recorded.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/ela_resnet18.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_plain import *

model.update(name="ela_resnet18")
optimizer.update(lr=0.1, weight_decay=1e-4)
epochs = 100
batch_size = 256
