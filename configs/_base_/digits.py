"""Handwritten digits at 32x32, as every experiment in configs/digits trains on them."""

from saccade.train.data.digits import Digits
from saccade.train.tasks.classify import Classify

model = dict(name="resnet18")
data = dict(type=Digits, img_size=32, shift=1.0)
task = dict(type=Classify, smoothing=0.1)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=2, warmup_lr=1e-6)
epochs = 20
eval_every = 2
log_every = 10
batch_size = 64
sync_bn = True
