"""ImageNet-1K as DeiT trains on it, which most attention backbones follow: 300 epochs of 1,024 images a step.

Differs from the published runs: autocast is bf16 where they use fp16 or fp32, as it needs no loss scaling and runs on
CPUs too; the learning rate is that of the step about to be taken, where some set it once an epoch or after the step;
with `ema`, the better of the averaged and the raw weights is kept, where BiFormer tests the raw ones. Tests use the
config's precision: precision=fp32 on the command line overrides it.
data.root: class folders, the original tar files, or shards that tools/shard.py wrote.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="biformer_s")
data = dict(
    type=ImageNet,
    root="data/imagenet",
    augment=dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel"),
    max_bad=100,
)
task = dict(type=Classify, mixup=0.8, cutmix=1.0, smoothing=0.1)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
epochs = 300
batch_size = 1024
precision = "bf16"
workers = 8
