"""ADE20K's scene parsing with Semantic FPN: crops of 512x512, as PVT trains on it.

Lengths are in steps. Tests are of whole images, resized to fit 2048x512 and then, as BiFormer's, to multiples of 32.
Differs from the published runs: autocast is bf16, where BiFormer uses fp16 and Agent Attention fp32; it needs no loss
scaling and runs on CPUs too. checkpoint=…: the backbone's weights, a classifier's on ImageNet-1K.
"""

from saccade.train.data.ade20k import Ade20k
from saccade.train.tasks.segment import Segment

model = dict(name="biformer_s")
data = dict(type=Ade20k, root="data/ADEChallengeData2016", scale=(2048, 512), crop=512)
task = dict(type=Segment, head="semantic_fpn", channels=128, auxiliary=0.0, multiple=32)
optimizer = dict(opt="adamw", lr=2e-4, weight_decay=1e-4, filter_bias_and_bn=False)
schedule = dict(sched="cosine", warmup_epochs=1000, warmup_lr=2e-5, min_lr=2e-12)
iterations = 80000
eval_every = 8000
save_every = 2000
batch_size = 32
precision = "bf16"
sync_bn = True
workers = 4
