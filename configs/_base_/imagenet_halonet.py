"""ImageNet-1K for HaloNets: 350 epochs of 4,096 images a step, smoothing, RandAugment and stochastic depth.

bf16 autocast is ours too: it needs no loss scaling and runs on CPUs.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="halo_h0")
data = dict(type=ImageNet, root="data/imagenet", augment=dict(auto_augment="rand-m10-mstd0.5"), max_bad=100)
task = dict(type=Classify, smoothing=0.1)
optimizer = dict(opt="adamw", lr=2e-3, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5)
epochs = 350
batch_size = 4096
precision = "bf16"
workers = 8
