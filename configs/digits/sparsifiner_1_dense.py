"""The dense parent of the sparse model of sparsifiner_3_sparse.py: a small DeiT on digits at 64x64, 4 x 4 patches.

93.9 % top-1 on the test split (one seed) after five minutes of CPU time. With timm's own initialisation, of standard
deviation 0.02, so narrow a model begins to learn later.

python tools/train.py configs/digits/sparsifiner_1_dense.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.digits import *

model.update(name="deit_tiny_patch16_224", embed_dim=96, depth=6, num_heads=3, weight_init="jax")
data.update(img_size=64)
schedule.update(warmup_epochs=5)
epochs = 60
eval_every = 5
batch_size = 32
