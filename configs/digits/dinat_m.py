"""A small DiNAT on digits: 97.8 % top-1 on the test split (one seed), in two minutes of CPU time.

Windows are 3 x 3; every second block of the first two stages is dilated.

python tools/train.py configs/digits/dinat_m.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="dinat_m", depths=(2, 2, 4, 1), dims=(32, 64, 128, 256))
model.update(kernel_size=3, dilations=((1, 4), (1, 2), 1, 1), drop_path_rate=0.1)
data.update(img_size=48)
optimizer.update(lr=1e-3)
epochs = 18
