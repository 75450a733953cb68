"""Digits on photographs, which `python tools/make_scenes.py runs/data/scenes` writes in COCO's layout, at 128x128.

A small Mask R-CNN learns them from a classifier of digits: the weights that `make demo` leaves in runs/demo.
"""

from saccade.train.data.coco import Coco
from saccade.train.tasks.detect import Detect

model = dict(name="biformer_t")
data = dict(
    type=Coco,
    root="runs/data/scenes/coco",
    train=("annotations/instances_train.json", "images/train"),
    val=("annotations/instances_val.json", "images/val"),
    test=("annotations/instances_test.json", "images/test"),
    short=128,
    long=128,
    flip=0.0,
)
task = dict(type=Detect, channels=64, hidden=256, rois=32, proposals=100, anchor_scale=5, test_size=(128, 128))
optimizer = dict(opt="adamw", lr=6e-4, weight_decay=0.05)
schedule = dict(sched="cosine", warmup_epochs=50, warmup_lr=1e-5)
iterations = 1000
batch_size = 4
log_every = 25
eval_every = 500
clip_grad = 5.0
