"""Second phase of Sparsifiner on digits: each query keeps a quarter of the keys, and the rest of the model learns to do
with them, from the labels and from its dense parent: 94.2 % top-1 on the test split, the parent's being 93.9 % (one
seed), after a minute and a half of CPU time.

python tools/train.py configs/digits/sparsifiner_1_dense.py
python tools/train.py configs/digits/sparsifiner_2_predictors.py
python tools/train.py configs/digits/sparsifiner_3_sparse.py
"""

from mmengine.config import read_base
from saccade.train.tasks.distill import Distill

with read_base():
    from .._base_.digits import *

model.update(name="sparsifiner_deit_t", dim=96, depth=6, heads=3, keep_rate=0.25, reduce_n=2)
data.update(img_size=64)
task = dict(type=Distill, phase="sparse", teacher="runs/digits/sparsifiner_1_dense", smoothing=0.1)
checkpoint = "runs/digits/sparsifiner_2_predictors"
optimizer.update(lr=5e-4)
epochs = 10
