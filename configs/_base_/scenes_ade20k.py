"""Digits on photographs, which `python tools/make_scenes.py runs/scenes` writes in ADE20K's layout."""

from saccade.train.data.ade20k import Ade20k
from saccade.train.tasks.segment import Segment

model = dict(name="biformer_t")
data = dict(type=Ade20k, root="runs/scenes/ade20k", scale=None, crop=128, augment=dict(ratios=(0.75, 1.25), hflip=0.0))
task = dict(type=Segment, channels=64)
optimizer = dict(opt="adamw", lr=5e-4, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=30, warmup_lr=1e-5)
iterations = 900
eval_every = 300
log_every = 25
batch_size = 8
clip_grad = 1.0
sync_bn = True
