"""COCO 2017: (configs, source, {key: published value})."""

import re

from support.recipes import Differs, NoDecay, steps

AGENT = "LeapLabTHU/Agent-Attention@207ce3e downstream/detection/configs"
BIFORMER = "rayleizhu/BiFormer@1697bbb object_detection/configs"
DAVIT = "dingmyu/davit@fc79470 mmdet/configs, README"
PATNET = "haiduo/PartialNet@679cfc0 detection"
NAT = "SHI-Labs/Neighborhood-Attention-Transformer@d334f5b detection/configs, README"
MMDET = "open-mmlab/mmdetection configs/_base_/models/faster_rcnn_r50_fpn.py, schedules/schedule_1x.py"

ADAMW = {"optimizer": "AdamW", "optimizer.betas": (0.9, 0.999), "optimizer.eps": 1e-8}
EPOCH = 7330  # steps of 16 images
BF16 = "autocast is bf16, where"
ONE_SIZE = {"data.short": 800, "data.long": 1333, "data.crop": None, "data.flip": 0.5}
DETR = {
    "data.short": tuple(range(480, 801, 32)),
    "data.long": 1333,
    "data.crop": dict(short=(400, 500, 600), side=(384, 600)),
    "data.flip": 0.5,
}


def schedule(epochs: int, rate: float):
    """1x or 3x, with 500 steps of warm-up from a thousandth."""
    return steps(rate, [n * EPOCH for n in ((8, 11) if epochs == 12 else (27, 33))], epochs * EPOCH, 500, 1e-3)


def row(
    name: str,
    source: str,
    expected: tuple,
    drop_path: object,
    rate: float = 1e-4,
    millions: float | None = None,
    **more,
):
    detector = re.match(r"(\w+?)_(agent|biformer|davit|dinats?|nat|patnet)", name)[1]
    values = {"task.detector": detector, "expected": expected, "model.drop_path_rate": drop_path}
    values |= {"model.name": name.removeprefix(f"{detector}_").removesuffix("_1x").removesuffix("_3x")}
    values |= {"schedule": schedule(36 if name.endswith("3x") else 12, rate)}
    return name, source, values | (dict(parameters=millions) if millions else {}) | more


OURS = "The drop path is ours: only the configs of DaViT-T are published"
SWIN_NO_DECAY = r"norm|relative_bias|\.attn\.(key|query)_(block|rows|columns)"

TABLE = [
    (
        "*",
        "all of them",
        ADAMW
        | ONE_SIZE
        | {
            "task.type": "Detect",
            "batch_size": 16,
            "accumulate": 1,
            "repeats": 1,
            "clip_grad": None,
            "ema": None,
            "sync_bn": False,
            "freeze": None,
            "task.norm_eval": False,
            "no decay": NoDecay(),
            "task.channels": 256,
            "task.hidden": 1024,
            "task.rois": 512,
            "task.proposals": 1000,
            "task.anchor_scale": None,
            "task.test_size": (800, 1333),
            "task.score_thresh": 0.05,
            "task.detections": 100,
            "precision": Differs("bf16", "fp32", BF16),
        },
    ),
    (
        "*agent_swin*",
        f"{AGENT}/agent_swin",
        DETR | {"optimizer.weight_decay": 0.05, "no decay": NoDecay(names=SWIN_NO_DECAY)},
    ),
    ("cascade_*", f"{AGENT}/agent_swin/*crcnn*: norm_cfg SyncBN in the heads", {"sync_bn": True}),
    ("*agent_pvt*", f"{AGENT}/agent_pvt", {"optimizer.weight_decay": 1e-4}),
    (
        "*biformer*",
        BIFORMER,
        {
            "task.norm_eval": True,
            "precision": Differs("bf16", "fp16", BF16),
            "model.n_win": 16,
            "model.topks": (1, 4, 16, -2),
        },
    ),
    (
        "mask_rcnn_biformer_*",
        f"{BIFORMER}/maskrcnn.1x.biformer_small.py:51-53",
        {"optimizer.weight_decay": 0.05, "no decay": NoDecay(names="norm")},
    ),
    ("retinanet_biformer_*", f"{BIFORMER}/retinanet.1x.biformer_small.py:52", {"optimizer.weight_decay": 1e-4}),
    ("*davit*", DAVIT, DETR | {"optimizer.weight_decay": 0.05}),
    ("*patnet*", f"{PATNET}/configs", {"optimizer.weight_decay": 1e-4, "precision": Differs("bf16", "fp32", BF16)}),
    *(
        row(f"mask_rcnn_agent_swin_{size}_{times}x", f"{AGENT}/agent_swin, README", ap, 0.1, millions=millions)
        for size, times, ap, millions in (
            ("t", 1, (44.6, 40.7), 48),
            ("t", 3, (47.3, 42.7), 48),
            ("s", 1, (47.2, 42.7), 69),
            ("s", 3, (48.9, 43.8), 69),
        )
    ),
    *(
        row(
            f"cascade_mask_rcnn_agent_swin_{size}_{times}x",
            f"{AGENT}/agent_swin, README",
            ap,
            drop_path,
            millions=millions,
        )
        for size, times, ap, drop_path, millions in (
            ("t", 1, (49.2, 42.7), 0.1, 86),
            ("t", 3, (51.4, 44.5), 0.1, 86),
            ("s", 3, (52.6, 45.5), 0.1, 107),
            ("b", 3, (52.6, 45.3), 0.4, 145),
        )
    ),
    *(
        row(f"mask_rcnn_agent_pvt_{size}_1x", f"{AGENT}/agent_pvt, README", ap, drop_path, 2e-4, millions)
        for size, ap, drop_path, millions in (
            ("t", (41.4, 38.7), 0.1, 31),
            ("s", (44.5, 41.2), 0.2, 40),
            ("m", (45.9, 42.0), 0.1, 56),
            ("l", (46.9, 42.8), 0.2, 68),
        )
    ),
    *(
        row(f"retinanet_agent_pvt_{size}_1x", f"{AGENT}/agent_pvt, README", ap, drop_path, 1e-4, millions)
        for size, ap, drop_path, millions in (
            ("t", (40.3,), 0.1, 21),
            ("s", (44.1,), 0.1, 30),
            ("m", (45.8,), 0.2, 46),
            ("l", (46.8,), 0.3, 58),
        )
    ),
    *(
        row(f"{detector}_biformer_{size}_1x", f"arXiv:2303.08810, {BIFORMER}", ap, drop_path)
        for detector, size, ap, drop_path in (
            ("mask_rcnn", "s", (47.8, 43.2), 0.2),
            ("mask_rcnn", "b", (48.6, 43.7), 0.3),
            ("retinanet", "s", (45.9,), 0.2),
            ("retinanet", "b", (47.1,), 0.3),
        )
    ),
    *(
        row(
            f"{detector}_davit_{size}_{times}x",
            DAVIT,
            ap,
            drop_path if size == "t" else Differs(drop_path, None, OURS),
            millions=millions,
        )
        for detector, size, times, ap, drop_path, millions in (
            ("mask_rcnn", "t", 1, (45.0, 41.1), 0.1, 47.8),
            ("mask_rcnn", "t", 3, (47.4, 42.9), 0.2, 47.8),
            ("mask_rcnn", "s", 1, (47.7, 42.9), 0.2, 69.2),
            ("mask_rcnn", "s", 3, (49.5, 44.3), 0.3, 69.2),
            ("mask_rcnn", "b", 1, (48.2, 43.3), 0.3, 107.3),
            ("mask_rcnn", "b", 3, (49.9, 44.6), 0.4, 107.3),
            ("retinanet", "t", 1, (44.0,), 0.1, 38.5),
            ("retinanet", "t", 3, (46.5,), 0.2, 38.5),
            ("retinanet", "s", 1, (46.0,), 0.2, 59.9),
            ("retinanet", "s", 3, (48.2,), 0.3, 59.9),
            ("retinanet", "b", 1, (46.7,), 0.3, 98.5),
            ("retinanet", "b", 3, (48.7,), 0.4, 98.5),
        )
    ),
    *(
        row(f"mask_rcnn_patnet_{size}_1x", f"{PATNET}/configs", (), drop_path, rate)
        for size, drop_path, rate in (("s", 0.15, 2e-4), ("m", 0.2, 1e-4), ("l", 0.3, 1e-4))
    ),
    *(
        (
            pattern,
            NAT,
            DETR
            | {
                "optimizer.weight_decay": 0.05,
                "no decay": NoDecay(names="norm|rpb"),
                "model.out_norms": True,
                "sync_bn": False,
                "precision": Differs("bf16", "fp16", BF16),
            },
        )
        for pattern in ("*_nat_*", "*_dinat_*", "*_dinats_*")
    ),
    ("*_dinat_*", NAT, {"model.dilations": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))}),
    ("*_dinats_*", NAT, {"model.dilations": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))}),
    *(
        row(f"{detector}_{name}_3x", NAT, ap, drop_path, rate, millions)
        for detector, name, millions, ap, drop_path, rate in (
            ("mask_rcnn", "nat_m", 40, (46.5, 41.7), 0.2, 1e-4),
            ("mask_rcnn", "nat_t", 48, (47.7, 42.6), 0.2, 1e-4),
            ("mask_rcnn", "nat_s", 70, (48.4, 43.2), 0.35, 1e-4),
            ("mask_rcnn", "dinat_m", 40, (47.2, 42.5), 0.2, 1e-4),
            ("mask_rcnn", "dinat_t", 48, (48.6, 43.5), 0.2, 1e-4),
            ("mask_rcnn", "dinat_s", 70, (49.3, 44.0), 0.35, 1e-4),
            ("mask_rcnn", "dinats_t", 48, (46.6, 42.1), 0.2, 1e-4),
            ("mask_rcnn", "dinats_s", 69, (48.6, 43.5), 0.35, 1e-4),
            ("cascade_mask_rcnn", "nat_m", 77, (50.3, 43.6), 0.2, 1e-4),
            ("cascade_mask_rcnn", "nat_t", 85, (51.4, 44.5), 0.3, 1e-4),
            ("cascade_mask_rcnn", "nat_s", 108, (52.0, 44.9), 0.3, 1e-4),
            ("cascade_mask_rcnn", "nat_b", 147, (52.3, 45.1), 0.5, 1e-4),
            ("cascade_mask_rcnn", "dinat_m", 77, (51.2, 44.4), 0.2, 1e-4),
            ("cascade_mask_rcnn", "dinat_t", 85, (52.2, 45.1), 0.3, 1e-4),
            ("cascade_mask_rcnn", "dinat_s", 108, (52.9, 45.8), 0.5, 1e-4),
            ("cascade_mask_rcnn", "dinat_b", 147, (53.4, 46.2), 0.6, 7.5e-5),
            ("cascade_mask_rcnn", "dinat_l", 258, (55.3, 47.8), 0.6, 7.5e-5),
            ("cascade_mask_rcnn", "dinats_t", 86, (51.0, 44.1), 0.3, 1e-4),
            ("cascade_mask_rcnn", "dinats_s", 107, (52.3, 45.2), 0.5, 1e-4),
            ("cascade_mask_rcnn", "dinats_b", 145, (52.6, 45.3), 0.6, 7.5e-5),
            ("cascade_mask_rcnn", "dinats_l", 253, (54.8, 47.2), 0.6, 5e-5),
        )
    ),
    (
        "faster_rcnn_ela_resnet50_1x",
        MMDET,
        {
            "optimizer": "SGD",
            "optimizer.betas": None,
            "optimizer.eps": None,
            "optimizer.momentum": 0.9,
            "optimizer.nesterov": False,
            "optimizer.weight_decay": 1e-4,
            "schedule": schedule(12, 0.02),
            "task.norm_eval": True,
            "freeze": 1,
            "expected": (),
            "task.detector": "faster_rcnn",
            "model.name": "ela_resnet50",
        },
    ),
]
