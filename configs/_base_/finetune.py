"""Fine-tuning on a folder of images: short, small steps, smaller still in the early layers."""

from saccade.train.data.folder import ImageFolder
from saccade.train.tasks.classify import Classify

model = dict(name="biformer_t", drop_path_rate=0.1)
data = dict(type=ImageFolder, augment=dict(scale=(0.35, 1.0), color_jitter=0.3))
task = dict(type=Classify, smoothing=0.1)
optimizer = dict(opt="adamw", lr=3e-4, weight_decay=0.05, layer_decay=0.75)
schedule = dict(sched="cosine", warmup_epochs=2, warmup_lr=1e-6)
epochs = 20
batch_size = 64
clip_grad = 1.0
sync_bn = True
workers = 2
