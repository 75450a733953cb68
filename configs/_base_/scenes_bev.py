"""Small road scenes with slopes and pedestals, six cameras of 56x96, lifted to a view of 32x32 cells of a metre."""

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
    bev_size=(32, 32),
    pc_range=(-16.0, -16.0, -3.2, 16.0, 16.0, 2.8),
    depth_bound=(1.0, 21.0, 1.0),
    depth_groups=(),
    depth_gain=10.0,  # of 20 bins: features are half as large as without depth at first, instead of a twentieth
    can_bus=0,
    drop_rate=0.0,
)
data = dict(type=BevScenes, train=400, val=40, test=100, img_size=(56, 96), frames=2, slope=0.15, stands=0.5)
task = dict(type=Lift, head="centre")
optimizer = dict(opt="adamw", lr=2e-3, weight_decay=0.01)
schedule = dict(sched="cosine", warmup_epochs=1, warmup_lr=1e-5)
epochs = 9
batch_size = 4
clip_grad = 10.0
eval_every = 9
log_every = 25
