"""Your own images, one folder a class: give it the folder, it finds the classes and makes a head for them.

One folder of class folders is divided 70/10/20; ROOT/train and ROOT/val are taken as they are.
python tools/train.py configs/finetune/folder.py data.root=/path/to/images checkpoint=weights.pth model.name=biformer_s
"""

from mmengine.config import read_base

with read_base():
    from .._base_.finetune import *
