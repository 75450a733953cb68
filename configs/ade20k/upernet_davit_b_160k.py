"""UPerNet on DaViT-B on ADE20K: mIoU 49.4 expected (arXiv:2204.03645).

The drop path is DaViT-T's: only the config of that size is published.

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_davit_b_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/davit_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="davit_b", drop_path_rate=0.3)
sync_bn = False
