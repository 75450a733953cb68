"""ImageNet-1K as NAT and DiNAT train on it: 300 epochs of 1,024 images a step, and 10 more at the final rate.

The bias tables are decayed: the published code means to exempt them, but by a method that timm does not call. Differs
from the published runs: autocast is bf16 where they use fp16 or fp32, as it needs no loss scaling and runs on CPUs too.
Tests use the config's precision: precision=fp32 on the command line overrides it.
data.root: class folders, the original tar files, or shards that tools/shard.py wrote.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="nat_t")
data = dict(
    type=ImageNet,
    root="data/imagenet",
    augment=dict(
        auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel", interpolation="random"
    ),
    max_bad=100,
)
task = dict(type=Classify, mixup=0.8, cutmix=1.0, smoothing=0.1)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=20, warmup_lr=1e-6, min_lr=5e-6, cooldown_epochs=10)
epochs = 300
batch_size = 1024
clip_grad = 5.0
precision = "bf16"
workers = 8
