"""UPerNet on Agent-Swin-B on ADE20K: mIoU 48.73, mAcc 60.01 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_agent_swin_b_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/agent_swin_b.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="agent_swin_b", drop_path_rate=0.5)
task.update(no_decay=("*norm*", "*.attn.key_*", "*.attn.query_*"))
