"""How good a frozen backbone's features are for your own images: a linear classifier on them.

python tools/probe.py configs/finetune/linear_probe.py data.root=/path/to/images checkpoint=runs/demo
"""

from mmengine.config import read_base
from saccade.train.probe import LogisticProbe

with read_base():
    from .._base_.probe import *

probe = dict(type=LogisticProbe, C=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
