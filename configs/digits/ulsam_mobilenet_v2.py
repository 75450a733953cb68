"""ULSAM-MobileNetV2 of half the width on digits: 96.1 % top-1 on the test split (one seed; 97.2 % on val)
after less than five minutes of one CPU core's time.

At 64 pixels the last maps are 4 x 4 and not 2 x 2 for stride 16; ULSAM's BatchNorms have the momentum of all others,
for with the published 0.9 their running statistics would be those of the last batch.

python tools/train.py configs/digits/ulsam_mobilenet_v2.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="ulsam_mobilenet_v2", width=0.5, output_stride=16, momentum=0.1)
data.update(img_size=64)
optimizer.update(lr=2e-3)
epochs = 30
batch_size = 32
