"""A narrow DaViT-T on digits: 98.6 % top-1 on the test split (one seed) after four and a half minutes on two CPU cores.

Overlapping patches and 48 pixels help: with the published ones at 32 pixels it stopped at 96 % on val.

python tools/train.py configs/digits/davit_t.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="davit_t", dims=(64, 128, 192, 256), window_size=6, overlapped_patch=True, drop_path_rate=0.1)
data.update(img_size=48)
optimizer.update(lr=1e-3)
epochs = 18
