"""ImageNet-1K as PATNet trains on it: 300 epochs, the first 280 at 192 pixels, without random erasing.

`epochs` counts those after the 20 of warm-up, over which the cosine runs. Differs from the published runs: rates and
batches are those of the comments in the published files, whose `batch_size: 256`, of all GPUs together, would meet the
same rates; the rate follows the step, not the epoch; autocast is bf16, not fp16.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="patnet_t0")
data = dict(
    type=ImageNet,
    root="data/imagenet",
    augment=dict(auto_augment=None, color_jitter=0.0),
    sizes={0: 192, 280: 224},
    max_bad=100,
)
task = dict(type=Classify, mixup=0.05, cutmix=1.0, smoothing=0.1)
optimizer = dict(opt="adamw", lr=4e-3, weight_decay=5e-3, filter_bias_and_bn=False)
schedule = dict(sched="cosine", warmup_epochs=20, warmup_prefix=True, warmup_lr=1e-6, min_lr=1e-5)
epochs = 280
batch_size = 4096
precision = "bf16"
workers = 8
