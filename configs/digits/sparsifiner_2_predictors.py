"""First phase of Sparsifiner on digits: its mask predictors learn the dense parent's attention.

python tools/train.py configs/digits/sparsifiner_1_dense.py
python tools/train.py configs/digits/sparsifiner_2_predictors.py
"""

from mmengine.config import read_base
from saccade.train.tasks.distill import Distill

with read_base():
    from .._base_.digits import *

model.update(name="sparsifiner_deit_t", dim=96, depth=6, heads=3, keep_rate=0.25, reduce_n=2)
data.update(img_size=64)
task = dict(type=Distill, phase="predictors")
checkpoint = "runs/digits/sparsifiner_1_dense"
optimizer.update(lr=3e-3)
epochs = 8
