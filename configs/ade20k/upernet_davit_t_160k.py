"""UPerNet on DaViT-T on ADE20K: mIoU 46.3 expected (arXiv:2204.03645).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_davit_t_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/davit_t.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="davit_t", drop_path_rate=0.3)
sync_bn = False
