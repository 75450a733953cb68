"""The dense parent of the sparse model of sparsifiner_3_sparse.py: a small DeiT on digits at 128x128, 8 x 8 patches.

python tools/train.py configs/digits/sparsifiner_1_dense.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="deit_tiny_patch16_224", embed_dim=96, depth=6, num_heads=3)
data.update(img_size=128)
optimizer.update(lr=1e-3)
epochs = 40
eval_every = 5
