"""A small model of every family, for tests common to all of them."""

import timm
import torch
from torch import Tensor, nn

BEV = dict(backbone="resnet18", strides=(16, 32), depth_stride=16, embed_dims=32, heads=4, points=4, tsa_points=2)
BEV |= dict(layers=1, ffn=32, bev_size=(6, 5), pillar=2, cams=2, can_bus=0, drop_rate=0.0)
BEV |= dict(depth_bound=(2.0, 10.0, 1.0), depth_groups=())
SPARSE = dict(img_size=64, depth=4, dim=48, heads=3, reduce_n=2, coef_topk=4)
SMALL: dict[str, dict] = dict(
    agent_cswin_t=dict(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), agent_blocks=(1, 1, 0, 0), img_size=64),
    agent_deit_t=dict(dim=48, depth=2, agent_blocks=1, img_size=64),
    agent_pvt_t=dict(dims=(16, 16, 20, 32), depths=(1, 1, 1, 1), img_size=64),
    agent_swin_t=dict(dims=(24, 24, 24, 48), depths=(1, 1, 2, 1), agent_blocks=(1, 1, 0, 0), img_size=64),
    biformer_t=dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1)),
    biformer_stl_nchw=dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1)),
    davit_t=dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1)),
    dfa3d_bev_s=BEV,
    dinat_m=dict(dims=(32, 32, 32, 32), depths=(1, 2, 1, 1), kernel_size=3, dilations=(1, (1, 2), 1, 1)),
    dinats_t=dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), kernel_size=3, layer_scale=1e-5),
    ela_mobilenetv2=dict(width=0.5),
    ela_resnet18=dict(channels=(16, 16, 32, 32)),
    halo_h0=dict(blocks=("A", "A", "A", "A"), block=4, halo=1),
    patnet_t0=dict(depths=(1, 1, 1, 1), dims=(16, 16, 16, 32), head_hidden_size=32, attn_drop_rate=0.0),
    patnet_t1=dict(depths=(1, 1, 1, 1), dims=(16, 16, 16, 32), head_hidden_size=32, attn_drop_rate=0.0),
    sparsifiner_deit_t=dict(SPARSE, token_keep_rate=0.7),
    sparsifiner_lvvit_s=SPARSE,
    ulsam_mobilenet_v1_050=dict(width=0.25),
    ulsam_mobilenet_v2=dict(width=0.25),
)


def build(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    defaults = SMALL[name] if name.startswith("dfa3d") else SMALL[name] | dict(num_classes=5)
    return timm.create_model(name, **(defaults | kwargs))


def images(name: str, batch: int = 3, size: tuple[int, int] = (64, 64), seed: int = 0) -> tuple[Tensor, ...]:
    """Return the arguments of the model's forward: images, and for a lifter also its two cameras' projections."""
    g = torch.Generator().manual_seed(seed)
    if not name.startswith("dfa3d"):
        return (torch.randn(batch, 3, *size, generator=g),)
    camera = torch.tensor([[40.0, 48, 0, 0], [0, 32, -40, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    cameras = torch.stack([camera, camera * torch.tensor([[-1.0], [-1], [-1], [1]])])
    return torch.randn(batch, 2, 3, *size, generator=g), cameras.expand(batch, 2, 4, 4).clone()
