"""ImageNet-1K for Sparsifiner's two phases: 1,344 images a step, no dropout and no stochastic depth.

`epochs` counts those after the three of warm-up from 0, over which the cosine runs. fp32, as published.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.distill import Distill

model = dict(name="sparsifiner_deit_s")
data = dict(
    type=ImageNet,
    root="data/imagenet",
    augment=dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel"),
    max_bad=100,
)
task = dict(type=Distill, phase="predictors", mixup=0.8, cutmix=1.0, smoothing=0.1)
optimizer = dict(opt="adamw", lr=3e-4, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=3, warmup_prefix=True, warmup_lr=0.0, min_lr=2e-4)
ema = dict(decay=0.9999)
epochs = 2
batch_size = 1344
workers = 8
