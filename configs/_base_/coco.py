"""COCO 2017 as Mask R-CNN's "1x" schedule trains on it: 12 epochs of 7,330 steps, 16 images a step.

Images are resized to fit 1333x800 and flipped at random. Lengths are in steps, as the warm-up takes 500. Differs from
the published runs: autocast is bf16, where BiFormer uses fp16 and the others fp32; it needs no loss scaling and runs on
CPUs too. checkpoint=…: the backbone's weights, a classifier's on ImageNet-1K.
"""

from saccade.train.data.coco import Coco
from saccade.train.tasks.detect import Detect

model = dict(name="biformer_s")
data = dict(type=Coco, root="data/coco", short=800, long=1333)
task = dict(type=Detect, detector="mask_rcnn")
optimizer = dict(opt="adamw", lr=1e-4, weight_decay=0.05)
schedule = dict(sched="multistep", decay_milestones=[58640, 80630], warmup_epochs=500, warmup_lr=1e-7)
iterations = 87960
eval_every = 7330
batch_size = 16
precision = "bf16"
workers = 4
