"""UPerNet on one's own pictures and label maps: short, small steps, smaller still in the early layers.

python tools/train.py configs/ade20k/own_folders.py data.root=/path checkpoint=/path/to/biformer_s.pth
"""

from saccade.train.data.ade20k import Folders
from saccade.train.tasks.segment import Segment

model = dict(name="biformer_s", n_win=8, out_norms=True, drop_path_rate=0.2)
data = dict(type=Folders, scale=(2048, 512), crop=512)
task = dict(type=Segment, channels=256)
optimizer = dict(opt="adamw", lr=1e-4, weight_decay=0.01, layer_decay=0.9)
schedule = dict(sched="poly", decay_rate=1.0, warmup_epochs=100, warmup_lr=1e-6)
iterations = 4000
eval_every = 500
batch_size = 8
clip_grad = 1.0
workers = 2
