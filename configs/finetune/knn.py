"""How good a frozen backbone's features are for your own images: their 20 nearest neighbours vote.

python tools/probe.py configs/finetune/knn.py data.root=/path/to/images checkpoint=weights.pth model.name=biformer_s
"""

from mmengine.config import read_base
from saccade.train.probe import KNN

with read_base():
    from .._base_.probe import *

probe = dict(type=KNN, k=20, temperature=0.07)
