"""DiNAT_s-Large on ImageNet-1K: 86.5 % top-1 expected (arXiv:2209.15001).

It starts from weights that were trained on ImageNet-22K, the authors' dinat_s_large_in22k_224.pth.
The published config names another model, dinat_large, by mistake.
The rate is constant: the schedule "linear" of the published config does not exist in the published script.

torchrun --nproc_per_node=8 tools/train.py configs/imagenet/dinats_l.py \\
  data.root=/path/to/imagenet checkpoint=/path/to/dinat_s_large_in22k_224.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.imagenet_nat import *

model.update(name="dinats_l", drop_path_rate=0.35)
task.update(mixup=0.0, cutmix=0.0)
optimizer.update(lr=5e-5, weight_decay=0.0001)
schedule.update(sched="step", decay_epochs=1000, warmup_epochs=0, cooldown_epochs=0)
epochs = 30
batch_size = 512
