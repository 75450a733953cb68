"""DFA3D-BEV small: mAP 40.1, NDS 50.1 expected on nuScenes val (arXiv:2307.12972, table 4; 40.3 and 50.9 re-trained).

torchrun --nproc_per_node=8 tools/train.py configs/nuscenes/dfa3d_bev_s.py data.root=/path/to/nuscenes
"""

from mmengine.config import read_base

with read_base():
    from .._base_.nuscenes_bev import *

model.update(name="dfa3d_bev_s")
data.update(scale=0.8, frames=3)
