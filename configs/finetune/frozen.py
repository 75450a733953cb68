"""Fine-tuning of the last stages alone: the stem and the first two stages keep their weights and statistics.

python tools/train.py configs/finetune/frozen.py data.root=/path/to/images checkpoint=weights.pth model.name=biformer_s
"""

from mmengine.config import read_base

with read_base():
    from .._base_.finetune import *

freeze = 2
