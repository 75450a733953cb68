"""BEVFormer small, without DFA3D: mAP 37.0, NDS 47.9 expected on nuScenes val (arXiv:2307.12972, table 4).

torchrun --nproc_per_node=8 tools/train.py configs/nuscenes/dfa2d_bev_s.py data.root=/path/to/nuscenes
"""

from mmengine.config import read_base

with read_base():
    from .._base_.nuscenes_bev import *

model.update(name="dfa3d_bev_s", lift_depth=False)
data.update(scale=0.8, frames=3)
