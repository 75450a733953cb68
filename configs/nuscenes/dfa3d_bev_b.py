"""DFA3D-BEV base: mAP 43.0, NDS 53.1 expected on nuScenes val (arXiv:2307.12972, table 4; 43.2 and 53.2 re-trained).

torchrun --nproc_per_node=8 tools/train.py configs/nuscenes/dfa3d_bev_b.py data.root=/path/to/nuscenes
"""

from mmengine.config import read_base

with read_base():
    from .._base_.nuscenes_bev import *
