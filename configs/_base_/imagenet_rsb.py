"""ImageNet-1K by procedure A1 of ResNet Strikes Back (arXiv:2110.00476): LAMB, 600 epochs, each class on its own.

Differs from the published runs: autocast is bf16, not fp16, as it needs no loss scaling and runs on CPUs too; the
threshold of mixed targets is that of others' copies of the procedure, the paper says only that both classes count
fully.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="halo_26t")
data = dict(
    type=ImageNet,
    root="data/imagenet",
    augment=dict(auto_augment="rand-m7-mstd0.5-inc1", color_jitter=0.0),
    max_bad=100,
)
task = dict(type=Classify, mixup=0.2, cutmix=1.0, smoothing=0.1, bce=True, bce_threshold=0.2)
optimizer = dict(opt="lamb", lr=5e-3, weight_decay=0.01)
schedule = dict(sched="cosine", warmup_epochs=5, warmup_lr=1e-4, min_lr=1e-6)
epochs = 600
batch_size = 2048
repeats = 3
precision = "bf16"
workers = 8
