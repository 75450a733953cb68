"""ImageNet-1K as small convolutional networks are trained: SGD without Nesterov, random crops and flips, nothing more.

Weight decay is on all parameters, norms and biases too, as PyTorch's SGD has it. bf16 autocast, which the papers do not
use, runs on CPUs too and needs no loss scaling.
"""

from saccade.train.data.imagenet import ImageNet
from saccade.train.tasks.classify import Classify

model = dict(name="ulsam_mobilenet_v2")
data = dict(type=ImageNet, root="data/imagenet", augment=dict(color_jitter=0.0), max_bad=100)
task = dict(type=Classify)
optimizer = dict(opt="momentum", lr=0.05, momentum=0.9, weight_decay=4e-5, filter_bias_and_bn=False)
schedule = dict(sched="cosine", warmup_epochs=5, warmup_lr=1e-3)
epochs = 150
batch_size = 256
precision = "bf16"
workers = 8
