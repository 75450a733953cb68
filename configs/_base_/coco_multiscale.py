"""COCO 2017 with the augmentation of DETR, 12 epochs of 7,330 steps ("1x"), 16 images a step.

The shorter side becomes 480 to 800 pixels, the longer one 1333 at most; half of the images are cropped before that. 3x
is iterations = 263880 with milestones at 197910 and 241890. Differs from the published runs: autocast is bf16, where
they use fp32; it needs no loss scaling and runs on CPUs too. checkpoint=…: the backbone's weights, a classifier's on
ImageNet-1K.
"""

from saccade.train.data.coco import Coco
from saccade.train.tasks.detect import Detect

model = dict(name="davit_t")
data = dict(
    type=Coco,
    root="data/coco",
    short=tuple(range(480, 801, 32)),
    long=1333,
    crop=dict(short=(400, 500, 600), side=(384, 600)),
)
task = dict(type=Detect, detector="mask_rcnn")
optimizer = dict(opt="adamw", lr=1e-4, weight_decay=0.05)
schedule = dict(sched="multistep", decay_milestones=[58640, 80630], warmup_epochs=500, warmup_lr=1e-7)
iterations = 87960
eval_every = 7330
batch_size = 16
precision = "bf16"
workers = 4
