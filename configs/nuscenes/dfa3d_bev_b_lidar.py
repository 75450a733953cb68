"""DFA3D-BEV base on the LiDAR's depth, tests too: mAP 57.6, NDS 63.6 expected on nuScenes val (arXiv:2307.12972).

torchrun --nproc_per_node=8 tools/train.py configs/nuscenes/dfa3d_bev_b_lidar.py data.root=/path/to/nuscenes
"""

from mmengine.config import read_base

with read_base():
    from .._base_.nuscenes_bev import *

model.update(depth_network=False)
task.update(known_depth=True)
