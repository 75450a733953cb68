"""ADE20K's scene parsing with UPerNet: 160,000 steps of 16 crops of 512x512, as mmsegmentation trains on it.

Lengths are in steps. Tests are of whole images, resized to fit 2048x512; for the result with flips and many scales:
task.flip=True task.scales="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)". Differs from the published runs: the warm-up rises to
the base rate, where mmsegmentation's multiplies the falling one (at most 1 % between them); autocast is bf16, where
BiFormer and NAT use fp16 and the others fp32; it needs no loss scaling and runs on CPUs too. checkpoint=…: the
backbone's weights, a classifier's on ImageNet-1K.
"""

from saccade.train.data.ade20k import Ade20k
from saccade.train.tasks.segment import Segment

model = dict(name="biformer_s", out_norms=True, drop_path_rate=0.3)
data = dict(type=Ade20k, root="data/ADEChallengeData2016", scale=(2048, 512), crop=512)
task = dict(type=Segment, head="upernet", channels=512, auxiliary=0.4)
optimizer = dict(opt="adamw", lr=6e-5, weight_decay=0.01, filter_bias_and_bn=False)
schedule = dict(sched="poly", decay_rate=1.0, warmup_epochs=1500, warmup_lr=6e-11)
iterations = 160000
eval_every = 16000
save_every = 2000
batch_size = 16
precision = "bf16"
sync_bn = True
workers = 4
