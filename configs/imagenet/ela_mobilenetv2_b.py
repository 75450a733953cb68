"""ELA-MobileNetV2 with ELA-B on ImageNet-1K: its accuracy is not known, the paper's table could not be read.

Rate, decay and schedule are the defaults of the published script, whose "step" mode multiplies the rate by 0.1 over the
run, a little in every step (here every epoch); the flags of the paper's runs are not recorded.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/ela_mobilenetv2_b.py data.root=/path/to/imagenet
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_plain import *

model.update(name="ela_mobilenetv2", version="b")
optimizer.update(lr=0.1, weight_decay=1e-4)
schedule = dict(sched="step", decay_epochs=1, decay_rate=0.1 ** (1 / 200))
epochs = 200
