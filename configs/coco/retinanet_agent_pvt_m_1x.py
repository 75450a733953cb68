"""RetinaNet on Agent-PVT-M, 1x, on COCO: box AP 45.8 expected (README of the published code).

torchrun --nproc_per_node=8 tools/train.py configs/coco/retinanet_agent_pvt_m_1x.py \\
  data.root=/path/to/coco checkpoint=/path/to/agent_pvt_m.pth
"""

from mmengine.config import read_base

with read_base():
    from .._base_.coco import *

model.update(name="agent_pvt_m", drop_path_rate=0.2)
task.update(detector="retinanet")
optimizer.update(weight_decay=1e-4, filter_bias_and_bn=False)
