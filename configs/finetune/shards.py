"""Fine-tuning on webdataset shards that tools/shard.py wrote, or on ImageNet in any of its layouts.

python tools/train.py configs/finetune/shards.py data.root=/path/to/shards checkpoint=weights.pth model.name=biformer_s
"""

from mmengine.config import read_base
from saccade.train.data.imagenet import ImageNet

with read_base():
    from .._base_.finetune import *

data.update(type=ImageNet)
