"""BEVFormer base, without DFA3D: mAP 41.6, NDS 51.7 expected on nuScenes val (arXiv:2307.12972, table 4).

torchrun --nproc_per_node=8 tools/train.py configs/nuscenes/dfa2d_bev_b.py data.root=/path/to/nuscenes
"""

from mmengine.config import read_base

with read_base():
    from .._base_.nuscenes_bev import *

model.update(lift_depth=False)
