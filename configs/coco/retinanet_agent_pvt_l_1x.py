"""RetinaNet on Agent-PVT-L, 1x, on COCO: box AP 46.8 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/retinanet_agent_pvt_l_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_pvt_l.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="agent_pvt_l", drop_path_rate=0.3)
task.update(detector="retinanet")
optimizer.update(weight_decay=1e-4, filter_bias_and_bn=False)
