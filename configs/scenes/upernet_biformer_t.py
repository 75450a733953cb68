"""BiFormer-T with UPerNet on digits on photographs, in ADE20K's layout.

python tools/make_scenes.py runs/data/scenes
python tools/train.py configs/scenes/upernet_biformer_t.py checkpoint=runs/demo
"""

from mmengine.config import read_base

with read_base():
    from .._base_.scenes_ade20k import *

model.update(n_win=4, topks=(1, 4, 8, -2), out_norms=True)
