"""UPerNet on one's own pictures and label maps: short, small steps, smaller still in the early layers.

python tools/train.py configs/ade20k/own_folders.py data.root=/path checkpoint=/path/to/biformer_s.pth
"""

from mmengine.config import read_base
from saccade.train.data.ade20k import Folders

with read_base():
    from .._base_.ade20k_upernet import *

model = dict(name="biformer_s", n_win=8, out_norms=True, drop_path_rate=0.2)
data = dict(type=Folders, scale=(2048, 512), crop=512)
task.update(channels=256)
optimizer = dict(opt="adamw", lr=1e-4, weight_decay=0.01, layer_decay=0.9)
schedule.update(warmup_epochs=100, warmup_lr=1e-6)
iterations, eval_every = 4000, 500
batch_size, clip_grad, workers = 8, 1.0, 2
