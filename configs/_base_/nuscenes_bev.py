"""BEVFormer's recipe with DFA3D on nuScenes: 24 epochs of AdamW, 8 samples a step, the image backbone at a tenth.

Published runs start from FCOS3D's ResNet-101 with deformable convolutions: give r101_dcn_fcos3d_pretrain.pth of
BEVFormer's releases as checkpoint=…; without it the frozen stem and first stage would stay random. One of timm's is
trained with model.backbone=resnet101 model.backbone_pretrained=True. With the CAN bus expansion in data.root, the ego's
accelerations and velocities are given as published, else zeros.

Lengths are in steps, 3,516 an epoch, as the warm-up takes 500. The stem, the first stage and all BatchNorms of the
backbone are frozen. Differs from the published runs: the cosine follows the step, not the epoch.
"""

from saccade.train.data.nuscenes import NuScenes
from saccade.train.tasks.lift import Lift

# Published models turn the view of before about the point (100, 100) of the map, whatever its size.
model = dict(name="dfa3d_bev_b", backbone="resnet101_dcn", can_bus=18, rotation_center=(100.0, 100.0))
data = dict(type=NuScenes, root="data/nuscenes", frames=4)
task = dict(type=Lift, head="decoder")
freeze = tuple(f"lifter.backbone.{part}" for part in ("conv1", "layer1", "*bn?", "*downsample.1"))
optimizer = dict(opt="adamw", lr=2e-4, weight_decay=0.01, layer_decay=0.1, filter_bias_and_bn=False)
schedule = dict(sched="cosine", warmup_epochs=500, warmup_lr=2e-4 / 3, min_lr=2e-7)
iterations = 84384
batch_size = 8
clip_grad = 35.0
eval_every = 14064
save_every = 1000
workers = 4
