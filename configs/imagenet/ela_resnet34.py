"""ELA-ResNet-34 on ImageNet-1K: no accuracy is published.

The recipe is ResNet's (arXiv:1512.03385), the rate divided by 10 every 30 epochs; the flags of ELA's runs are not
recorded.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/ela_resnet34.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_plain import *

model.update(name="ela_resnet34")
optimizer.update(lr=0.1, weight_decay=1e-4)
schedule = dict(sched="step", decay_epochs=30, decay_rate=0.1)
epochs = 100
