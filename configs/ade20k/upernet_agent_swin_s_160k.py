"""UPerNet on Agent-Swin-S on ADE20K: mIoU 48.08, mAcc 59.78 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/ade20k/upernet_agent_swin_s_160k.py \\
  data.root=/path/to/ADEChallengeData2016 checkpoint=/path/to/agent_swin_s.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.ade20k_upernet import *

model.update(name="agent_swin_s", drop_path_rate=0.3)
task.update(no_decay=("*norm*", "*.attn.key_*", "*.attn.query_*"))
