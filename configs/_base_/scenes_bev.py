"""Small road scenes with slopes and pedestals, six cameras of 56x96, lifted to a view of 24x24 cells of a metre.

For ten minutes on two cores. Content is learned soon: the cells begin nearly alike (cell_noise), samples begin close to
the points above them (offset_scale), and features are about as large as without depth (depth_gain, of 20 bins).
"""

from saccade.train.data.bev_scenes import BevScenes
from saccade.train.tasks.lift import Lift

model = dict(
    name="dfa3d_bev_s",
    backbone="resnet10t",
    backbone_args=dict(channels=(24, 48, 96, 96), stem_width=16),
    strides=(8, 16),
    depth_stride=8,
    embed_dims=64,
    heads=4,
    points=4,
    layers=1,
    ffn=128,
    bev_size=(24, 24),
    pc_range=(-12.0, -12.0, -2.8, 12.0, 12.0, 1.2),
    depth_bound=(1.0, 17.0, 0.8),
    depth_groups=(),
    depth_gain=20.0,
    cell_noise=0.05,
    offset_scale=0.25,
    cams=0,  # the cameras are alike
    can_bus=0,
    drop_rate=0.0,
)
data = dict(
    type=BevScenes, train=400, val=20, test=100, img_size=(56, 96), radius=12.0, frames=2, slope=0.2, stands=0.5
)
task = dict(type=Lift, head="centre", head_args=dict(yaw_weight=4.0), depth_weight=1.0)
optimizer = dict(opt="adamw", lr=2e-3, weight_decay=0.01)
schedule = dict(sched="cosine", warmup_epochs=30, warmup_lr=1e-5)
iterations = 1000
batch_size = 2
clip_grad = 10.0
eval_every = 1000
log_every = 50
