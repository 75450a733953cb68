"""Digits on photographs, which `python tools/make_scenes.py runs/data/scenes` writes in ADE20K's layout."""

from saccade.train.data.ade20k import Ade20k
from saccade.train.tasks.segment import Segment

model = dict(name="biformer_t")
data = dict(
    type=Ade20k,
    root="runs/data/scenes/ade20k",
    scale=(128, 128),
    crop=96,
    augment=dict(ratios=(0.6, 1.1), hflip=0.0, distort=False),
)
task = dict(type=Segment, channels=64, class_weights=(1,) + (6,) * 10)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=30, warmup_lr=1e-5)
iterations = 1800
eval_every = 600
log_every = 25
batch_size = 4
clip_grad = 1.0
sync_bn = True
