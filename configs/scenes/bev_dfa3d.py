"""DFA3D on small road scenes.

python tools/train.py configs/scenes/bev_dfa3d.py
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes_bev import *
