"""Mask R-CNN on BiFormer-T, on digits on photographs.

python tools/make_scenes.py runs/data/scenes
torchrun --nproc_per_node=2 tools/train.py configs/scenes/mask_rcnn_biformer_t.py checkpoint=runs/demo
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes import *

model.update(name="biformer_t", n_win=4, topks=(1, 4, 16, -2))
