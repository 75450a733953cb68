"""ADE20K: (configs, source, {key: published value})."""

from support.recipes import Differs, NoDecay, cosine, poly

AGENT = "LeapLabTHU/Agent-Attention@207ce3e downstream/segmentation/configs"
BIFORMER = "rayleizhu/BiFormer@1697bbb semantic_segmentation/configs"
DAVIT = "dingmyu/davit@fc79470 mmseg/configs, README"
NAT = "SHI-Labs/Neighborhood-Attention-Transformer@d334f5b segmentation/configs, README"
STAGE_3 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)  # of the large models
SWIN_NO_DECAY = r"norm|relative_bias|\.attn\.(key|query)_(block|rows|columns)"
BF16 = "autocast is bf16, where BiFormer"
DAVIT_T = "The drop path is DaViT-T's: only the config of that size is published"


def row(name: str, source: str, expected: tuple, drop_path: object, millions: int | None = None) -> tuple:
    values = {"model.name": name.partition("_")[2].rpartition("_")[0], "expected": expected}
    values |= {"model.drop_path_rate": drop_path} | ({"parameters": millions} if millions else {})
    return name, source, values


TABLE = [
    (
        "*",
        "all of them",
        {
            "task.type": "Segment",
            "data.scale": (2048, 512),
            "data.crop": 512,
            "data.augment": None,
            "accumulate": 1,
            "repeats": 1,
            "clip_grad": None,
            "ema": None,
            "freeze": None,
            "sync_bn": True,
            "batch_size": 16,
            "task.drop_rate": 0.1,
            "optimizer": "AdamW",
            "optimizer.betas": (0.9, 0.999),
            "optimizer.eps": 1e-8,
            "task.class_weights": None,
            "task.multiple": 1,
            "task.scales": (1.0,),
            "task.flip": False,
            "task.crop": None,
            "task.stride": None,
            "no decay": NoDecay(),
        },
    ),
    (
        "upernet_*",
        "open-mmlab/mmsegmentation schedules/schedule_160k.py, models/upernet_swin.py",
        {
            "task.head": "upernet",
            "task.channels": 512,
            "task.auxiliary": 0.4,
            "optimizer.weight_decay": 0.01,
            "schedule": poly(6e-5, 1.0, 160_000, 1500, 1e-6),
            "model.out_norms": True,
            "precision": Differs("bf16", "fp32", BF16),
        },
    ),
    (
        "fpn_*",
        f"{AGENT}/agent_pvt, {BIFORMER}/ade20k/sfpn*",
        {
            "task.head": "semantic_fpn",
            "task.channels": 128,
            "task.auxiliary": 0.0,
            "optimizer.weight_decay": 1e-4,
            "precision": Differs("bf16", "fp32", BF16),
        },
    ),
    ("*biformer*", BIFORMER, {"model.n_win": 8, "model.out_norms": True, "precision": Differs("bf16", "fp16", BF16)}),
    ("upernet_biformer_*", BIFORMER, {"no decay": NoDecay(names="norm")}),
    (
        "fpn_biformer_*",
        f"{BIFORMER}/ade20k/sfpn*: AlignResize to multiples of 32",
        {
            "task.multiple": 32,
            "batch_size": 32,
            "schedule": cosine(2e-4, 2e-12, 80_000, 1000, 2e-5),
        },
    ),
    ("upernet_agent_swin_*", f"{AGENT}/agent_swin", {"no decay": NoDecay(names=SWIN_NO_DECAY)}),
    ("upernet_davit_*", f"{DAVIT}: BN in the heads", {"sync_bn": False}),
    ("fpn_agent_pvt_*", f"{AGENT}/agent_pvt, ../_base_/datasets/ade20k.py:27", {"schedule": poly(2e-4, 0.9, 40_000)}),
    *(
        (pattern, NAT, {"no decay": NoDecay(names="norm|rpb"), "precision": Differs("bf16", "fp16", BF16)})
        for pattern in ("upernet_nat_*", "upernet_dinat_*", "upernet_dinats_*")
    ),
    ("upernet_dinat_*", NAT, {"model.dilations": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}),
    ("upernet_dinats_*", NAT, {"model.dilations": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}),
    (
        "upernet_dinat*_l_160k",
        f"{NAT}: the crop is what the dilations are for",
        {"data.crop": 640, "data.scale": (2560, 640)},
    ),
    ("upernet_dinat_l_160k", NAT, {"model.dilations": ((1, 20), (1, 5, 1, 10), STAGE_3, (1, 2))}),
    ("upernet_dinats_l_160k", NAT, {"model.dilations": ((1, 20), (1, 10), STAGE_3, (1, 2))}),
    row("upernet_nat_m_160k", NAT, (45.1, 46.4), 0.2, 50),
    row("upernet_nat_t_160k", NAT, (47.1, 48.4), 0.3, 58),
    row("upernet_nat_s_160k", NAT, (48.0, 49.5), 0.5, 82),
    row("upernet_nat_b_160k", NAT, (48.5, 49.7), 0.5, 123),
    row("upernet_dinat_m_160k", NAT, (45.8, 47.2), 0.2, 50),
    row("upernet_dinat_t_160k", NAT, (47.8, 48.8), 0.3, 58),
    row("upernet_dinat_s_160k", NAT, (48.9, 49.9), 0.5, 82),
    row("upernet_dinat_b_160k", NAT, (49.6, 50.4), 0.5, 123),
    row("upernet_dinat_l_160k", NAT, (54.0, 54.9), 0.3, 238),
    row("upernet_dinats_t_160k", NAT, (46.0, 47.4), 0.3, 60),
    row("upernet_dinats_s_160k", NAT, (48.6, 49.9), 0.3, 81),
    row("upernet_dinats_b_160k", NAT, (49.4, 50.2), 0.3, 121),
    row("upernet_dinats_l_160k", NAT, (53.4, 54.6), 0.3, 234),
    row("upernet_biformer_s_160k", "arXiv:2303.08810", (49.8, 50.8), 0.3),
    row("upernet_biformer_b_160k", "arXiv:2303.08810", (51.0, 51.7), 0.4),
    row("fpn_biformer_s_80k", "arXiv:2303.08810", (48.9,), 0.15),
    row("fpn_biformer_b_80k", "arXiv:2303.08810", (49.9,), 0.3),
    row("upernet_davit_t_160k", DAVIT, (46.3,), 0.3, 60),
    row("upernet_davit_s_160k", DAVIT, (48.8,), Differs(0.3, None, DAVIT_T), 81),
    row("upernet_davit_b_160k", DAVIT, (49.4,), Differs(0.3, None, DAVIT_T), 121),
    row("upernet_agent_swin_t_160k", f"{AGENT}/agent_swin, README", (46.68, 58.53), 0.3, 61),
    row("upernet_agent_swin_s_160k", f"{AGENT}/agent_swin, README", (48.08, 59.78), 0.3, 81),
    row("upernet_agent_swin_b_160k", f"{AGENT}/agent_swin, README", (48.73, 60.01), 0.5, 121),
    row("fpn_agent_pvt_t_40k", f"{AGENT}/agent_pvt, README", (40.18, 51.76), 0.1, 15),
    row("fpn_agent_pvt_s_40k", f"{AGENT}/agent_pvt, README", (44.18, 56.17), 0.1, 24),
    row("fpn_agent_pvt_m_40k", f"{AGENT}/agent_pvt, README", (44.30, 56.42), 0.2, 40),
    row("fpn_agent_pvt_l_40k", f"{AGENT}/agent_pvt, README", (46.52, 58.50), 0.1, 52),
    (
        "own_folders",
        "none: a recipe of ours for one's own images",
        {
            "expected": (),
            "model.n_win": 8,
            "model.out_norms": True,
            "task.head": "upernet",
            "task.auxiliary": 0.4,
            "optimizer.weight_decay": 0.01,
            "model.name": "biformer_s",
            "model.drop_path_rate": 0.2,
            "task.channels": 256,
            "clip_grad": 1.0,
            "batch_size": 8,
            "optimizer.layer_decay": 0.9,
            "no decay": NoDecay(True),
            "schedule": poly(1e-4, 1.0, 4000, 100, 0.01)._replace(within=0.03),
            "precision": "bf16",
        },
    ),
]
