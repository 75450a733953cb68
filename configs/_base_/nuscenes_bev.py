"""BEVFormer's recipe with DFA3D on nuScenes: 24 epochs of AdamW, 8 samples a step, the image backbone at a tenth."""

from saccade.train.data.nuscenes import NuScenes
from saccade.train.tasks.lift import Lift

# Published: a ResNet-101 with deformable convolutions, trained as FCOS3D; neither is in timm, nor the CAN bus's numbers
# in nuScenes' own tables, beside which its poses give the ego's motion.
model = dict(name="dfa3d_bev_b", backbone="resnet101", backbone_pretrained=True, can_bus=0)
data = dict(type=NuScenes, root="data/nuscenes", frames=4)
task = dict(type=Lift, head="decoder")
optimizer = dict(opt="adamw", lr=2e-4, weight_decay=0.01, layer_decay=0.1)
schedule = dict(sched="cosine", warmup_epochs=1, warmup_lr=6.7e-5, min_lr=2e-7)
epochs = 24
batch_size = 8
clip_grad = 35.0
eval_every = 4
workers = 4
