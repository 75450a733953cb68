"""COCO 2017 as NAT and DiNAT train on it: the augmentation of DETR, 36 epochs of 7,330 steps ("3x"), 16 images a step.

The shorter side becomes 480 to 800 pixels, the longer one 1333 at most; half of the images are cropped before that.
Norms and bias tables are not decayed. Maps that are smaller than the windows are padded. Differs from the published
runs: autocast is bf16, where they use fp16 (fp32 for DiNAT-Large); it needs no loss scaling and runs on CPUs too.
checkpoint=…: the backbone's weights, a classifier's on ImageNet-1K, which serve other dilations as they are.
"""

from saccade.train.data.coco import Coco
from saccade.train.tasks.detect import Detect

model = dict(name="nat_t", out_norms=True)
data = dict(
    type=Coco,
    root="data/coco",
    short=tuple(range(480, 801, 32)),
    long=1333,
    crop=dict(short=(400, 500, 600), side=(384, 600)),
)
task = dict(type=Detect, detector="mask_rcnn", no_decay=("*norm*", "*rpb*"))
optimizer = dict(opt="adamw", lr=1e-4, weight_decay=0.05, filter_bias_and_bn=False)
schedule = dict(sched="multistep", decay_milestones=[197910, 241890], warmup_epochs=500, warmup_lr=1e-7)
iterations = 263880
eval_every = 7330
batch_size = 16
precision = "bf16"
workers = 4
