"""ImageNet-1K: (configs, source, {key: published value})."""

from support.recipes import Differs, NoDecay, Schedule, cosine, exponential, steps

AGENT = "LeapLabTHU/Agent-Attention@207ce3e agent_transformer/"
BIFORMER = "rayleizhu/BiFormer@1697bbb"
DAVIT = "dingmyu/davit@fc79470"
PATNET = "haiduo/PartialNet@679cfc0"
SPARSIFINER = "lim142857/Sparsifiner@9a11e26"
ELA = "Xuwei86/ELA_Code@cd4594d MbV2/"
ULSAM = "Nandan91/ULSAM@9a07d68 poster"
TIMM = "huggingface/pytorch-image-models@aa4b585"
RSB = "arXiv:2110.00476, procedure A1"
HALONET = "arXiv:2103.12731"
NAT = "SHI-Labs/Neighborhood-Attention-Transformer@d334f5b classification"

CROPS = dict(hflip=0.5, train_crop_mode=None)


def augment(auto: str | None, jitter: float, erasing: float, interpolation: str = "bicubic") -> dict:
    """All of timm's training transform but its size; a crop of 8 to 100 % and a flip are its own defaults."""
    values = dict(hflip=0.5, interpolation=interpolation)
    values |= dict(auto_augment=auto) if auto else {}
    values |= dict(color_jitter=jitter) if jitter else {}
    return values | (dict(re_prob=erasing, re_mode="pixel", re_count=1) if erasing else {})


def test(size: int, crop: float, interpolation: str = "bicubic") -> tuple[int, int, str]:
    return int(size / crop), size, interpolation


ADAMW = {"optimizer": "AdamW", "optimizer.betas": (0.9, 0.999), "optimizer.eps": 1e-8}
MIXED = {"task.mixup": 0.8, "task.cutmix": 1.0, "task.mix_prob": 1.0, "task.switch_prob": 0.5, "task.smoothing": 0.1}
DEIT = augment("rand-m9-mstd0.5-inc1", 0.4, 0.25)
BF16 = "autocast is bf16 where they use fp16 or fp32"
ALONE = {
    "task.type": "Classify",
    "repeats": 1,
    "accumulate": 1,
    "ema": None,
    "clip_grad": None,
    "sync_bn": False,
    "freeze": None,
}


def agent(name: str, top1: float, drop_path: float, images: int, size: int = 224, crop: float = 0.875, **more) -> tuple:
    """A row of the README, and cfgs/NAME.yaml: stochastic depth and the batch of 8 GPUs; rates are per 512 images."""
    tag = f".untrained_{size}" if size != 224 else ""
    values = {"model.name": name + tag, "expected": (top1,), "model.drop_path_rate": drop_path, "batch_size": images}
    values |= {"test": test(size, crop), "data.img_size": None}
    return (
        name + (f"_{size}" if size != 224 else ""),
        f"{AGENT}cfgs/{name}{f'_{size}' if size != 224 else ''}.yaml, README",
        values | more,
    )


def scaled(images: int, warmup: int, start: float, end: float, base: float = 5e-4, epochs: int = 300, hold: int = 0):
    """Agent Attention's rates, all three of them times batch / 512 (main.py)."""
    scale = images / 512
    return cosine(base * scale, end * scale, epochs, warmup, start * scale, hold)


AGENTS = [
    (
        "agent_*",
        f"{AGENT}config.py, optimizer.py",
        ADAMW
        | MIXED
        | ALONE
        | {
            "augment": DEIT,
            "data.sizes": None,
            "optimizer.weight_decay": 0.05,
            "task.bce": False,
            "precision": Differs("bf16", "fp32", BF16),
        },
    ),
    (
        "agent_deit_*",
        f"{AGENT}models/agent_deit.py, optimizer.py",
        {"clip_grad": 5.0, "no decay": NoDecay(True, r"^(pos_embed|cls_token)$")},
    ),
    (
        "agent_pvt_*",
        f"{AGENT}models/agent_pvt.py: only cls_token, which PVT's first three stages lack",
        {"no decay": NoDecay(True, r"^cls_token$")},
    ),
    (
        "agent_swin_*",
        f"{AGENT}models/agent_swin.py: relative_position_bias_table",
        {"clip_grad": 5.0, "no decay": NoDecay(True, r"relative_(position_)?bias")},
    ),
    ("agent_cswin_*", f"{AGENT}models/agent_cswin.py, main_ema.py", {"no decay": NoDecay(True)}),
    agent("agent_deit_t", 74.9, 0.0, 4096, schedule=scaled(4096, 20, 5e-7, 5e-6)),
    agent("agent_deit_s", 80.5, 0.1, 1024, schedule=scaled(1024, 20, 5e-7, 5e-6)),
    agent("agent_deit_b", 82.0, 0.3, 1024, schedule=scaled(1024, 20, 5e-7, 5e-6)),
    agent("agent_deit_s", 83.1, 0.1, 512, 448, schedule=scaled(512, 20, 5e-7, 5e-6), parameters=23_070_472),
    agent("agent_pvt_t", 78.4, 0.1, 1024, schedule=scaled(1024, 5, 1e-6, 1e-5, hold=10)),
    agent("agent_pvt_s", 82.2, 0.1, 1024, schedule=scaled(1024, 5, 1e-6, 1e-5, hold=10)),
    agent("agent_pvt_m", 83.4, 0.3, 1024, schedule=scaled(1024, 5, 1e-6, 1e-5, hold=10), clip_grad=1.0),
    agent("agent_pvt_l", 83.7, 0.3, 512, schedule=scaled(512, 5, 1e-6, 1e-5, hold=10), clip_grad=1.0),
    agent(
        "agent_pvt_m",
        83.8,
        0.3,
        512,
        256,
        schedule=scaled(512, 5, 1e-6, 1e-5, hold=10),
        clip_grad=1.0,
        parameters=36_083_682,
    ),
    agent("agent_swin_t", 82.6, 0.2, 1024, schedule=scaled(1024, 20, 5e-7, 5e-6)),
    agent("agent_swin_s", 83.7, 0.3, 1024, schedule=scaled(1024, 20, 5e-7, 5e-6)),
    agent("agent_swin_b", 84.0, 0.5, 512, schedule=scaled(512, 20, 5e-7, 5e-6)),
    agent("agent_swin_s", 84.1, 0.3, 512, 288, 1.0, schedule=scaled(512, 20, 5e-7, 5e-6), parameters=49_707_964),
    agent(
        "agent_swin_b",
        84.9,
        0.5,
        256,
        384,
        1.0,
        parameters=88_305_016,
        schedule=scaled(256, 5, 2e-8, 2e-7, 2e-5, 30),
        **{"optimizer.weight_decay": 1e-8},
    ),
    agent("agent_cswin_t", 83.1, 0.2, 1024, schedule=scaled(1024, 20, 1e-6, 1e-5, hold=10), ema=dict(decay=0.99984)),
    agent("agent_cswin_s", 83.9, 0.4, 1024, schedule=scaled(1024, 20, 1e-6, 1e-5, hold=10), ema=dict(decay=0.99984)),
    agent(
        "agent_cswin_b",
        84.7,
        0.5,
        512,
        schedule=scaled(512, 20, 1e-6, 1e-5, hold=10),
        ema=dict(decay=0.99992),
        **{"optimizer.weight_decay": 0.1},
    ),
    agent(
        "agent_cswin_b",
        85.8,
        0.7,
        256,
        384,
        parameters=73_328_416,
        ema=dict(decay=0.9998),
        schedule=scaled(256, 0, 5e-6, 5e-7, 5e-6, 20, 10),
        **{"optimizer.weight_decay": 1e-8},
    ),
]

BIFORMERS = [
    (
        "biformer_*",
        f"{BIFORMER} main.py",
        ADAMW
        | MIXED
        | ALONE
        | {
            "augment": DEIT,
            "test": test(224, 0.875),
            "optimizer.weight_decay": 0.05,
            "no decay": NoDecay(True),
            "batch_size": 1024,
            "repeats": 3,
            "ema": dict(decay=0.99996),
            "precision": Differs("bf16", "fp16", BF16),
            "schedule": cosine(1e-3, 1e-5, 300, 5, 1e-6),
            "task.bce": False,
        },
    ),
    *(
        (
            f"biformer_{size}",
            f"arXiv:2303.08810 and {BIFORMER} scripts/train.sh",
            {
                "model.name": f"biformer_{size}",
                "expected": (top1,),
                "model.drop_path_rate": drop_path,
            },
        )
        for size, top1, drop_path in (("t", 81.4, 0.1), ("s", 83.8, 0.15), ("stl", 82.7, 0.1), ("stl_nchw", 82.7, 0.1))
    ),
    (
        "biformer_b",
        "arXiv:2303.08810",
        {
            "model.name": "biformer_b",
            "expected": (84.3,),
            "model.drop_path_rate": Differs(0.4, None, "it could not be confirmed"),
        },
    ),
]

DAVITS = [
    (
        "davit_*",
        f"{DAVIT} train.py, README",
        ADAMW
        | MIXED
        | ALONE
        | {
            "augment": DEIT,
            "test": Differs(test(224, 0.95), test(224, 0.9), "the published code 90 %"),
            "optimizer.weight_decay": 0.05,
            "no decay": NoDecay(True),
            "batch_size": 1024,
            "clip_grad": 1.0,
            "precision": Differs("bf16", "fp16", BF16),
            "schedule": cosine(1e-3, 1e-5, 300, 5, 1e-6, 10),
            "task.bce": False,
        },
    ),
    (
        "davit_t",
        f"{DAVIT} train.py, README",
        {"model.name": "davit_t", "expected": (82.8,), "model.drop_path_rate": 0.1},
    ),
    *(
        (
            f"davit_{size}",
            "arXiv:2204.03645",
            {
                "model.name": f"davit_{size}",
                "expected": (top1,),
                "model.drop_path_rate": Differs(drop_path, None, "could not be confirmed"),
            },
        )
        for size, top1, drop_path in (("s", 84.2, 0.2), ("b", 84.6, 0.4))
    ),
]


def patnet(
    size: str, top1: float, auto: str | None, mixup: float, drop_path: float, decay: float, clip: float | None = None
) -> tuple:
    big = size in "ml"
    rate, images = (2e-3, 2048) if big else (4e-3, 4096)
    return (
        f"patnet_{size}",
        f"{PATNET} cfg/PartialNet_{size}.yaml, README",
        {
            "model.name": f"patnet_{size}",
            "expected": (top1,),
            "model.drop_path_rate": drop_path,
            "augment": augment(auto, 0, 0),
            "task.mixup": mixup,
            "optimizer.weight_decay": decay,
            "clip_grad": clip,
            "batch_size": Differs(images, 256, "whose `batch_size: 256`"),
            "schedule": cosine(rate, 1e-5, 300, 20, 1e-6, after_warmup=True),
        },
    )


PATNETS = [
    (
        "patnet_*",
        f"{PATNET} model_api.py:235-242, cfg",
        ADAMW
        | MIXED
        | ALONE
        | {
            "data.sizes": {0: 192, 280: 224},
            "data.img_size": None,
            "test": test(224, 0.9),
            "task.bce": False,
            "no decay": NoDecay(),
            "precision": Differs("bf16", "fp16", "autocast is bf16, not fp16"),
        },
    ),
    patnet("t0", 73.9, None, 0.05, 0.0, 5e-3),
    patnet("t1", 78.1, "rand-m3-mstd0.5-inc1", 0.1, 0.02, 0.01),
    patnet("t2", 80.2, "rand-m5-mstd0.5-inc1", 0.1, 0.05, 0.02),
    patnet("s", 82.1, "rand-m7-mstd0.5-inc1", 0.3, 0.1, 0.03),
    patnet("m", 83.1, "rand-m7-mstd0.5-inc1", 0.5, 0.2, 0.05, 1.0),
    patnet("l", 83.9, "rand-m7-mstd0.5-inc1", 0.7, 0.3, 0.05, 0.01),
]

SPARSIFINERS = [
    (
        "sparsifiner_*",
        f"{SPARSIFINER} sparsifiner_default_config.yaml",
        ADAMW
        | MIXED
        | ALONE
        | {
            "task.type": "Distill",
            "augment": DEIT,
            "test": test(224, 0.875),
            "optimizer.weight_decay": 0.05,
            "batch_size": 1344,
            "precision": "fp32",
            "ema": dict(decay=0.9999),
            "task.reconstruction": 0.01,
            "task.logits": 0.5,
            "task.tokens": 0.5,
        },
    ),
    (
        "sparsifiner_*_1_predictors",
        f"{SPARSIFINER} src/utils.py:444-461",
        {
            "task.phase": "predictors",
            "schedule": cosine(3e-4, 2e-4, 5, 3, 0, after_warmup=True),
            "no decay": NoDecay(True),
        },
    ),
    (
        "sparsifiner_*_2_sparse",
        f"{SPARSIFINER} src/utils.py:444-461, src/main.py: the optimizer is timm's",
        {
            "task.phase": "sparse",
            "schedule": cosine(8e-5, 2e-6, 45, 3, 0, after_warmup=True),
            "no decay": NoDecay(True, r"^(pos_embed|cls_token)$"),
        },
    ),
    *(
        (
            f"sparsifiner_{kind}_*",
            f"{SPARSIFINER} README: the parents",
            {"model.name": f"sparsifiner_{kind}", "expected": ()},
        )
        for kind in ("deit_t", "deit_s", "deit_b", "lvvit_s", "lvvit_m")
    ),
    *(
        (
            f"sparsifiner_{kind}_2_sparse",
            "arXiv:2303.13755: points below the parent, and its top-1",
            {"expected": (0.4, parent)},
        )
        for kind, parent in (("deit_s", 79.8), ("lvvit_s", 83.3), ("lvvit_m", 84.0))
    ),
]

SGD = {"optimizer": "SGD", "optimizer.momentum": 0.9, "optimizer.nesterov": False}
PLAIN = (
    SGD
    | ALONE
    | {
        "task.smoothing": 0.0,
        "task.mixup": 0.0,
        "task.cutmix": 0.0,
        "task.bce": False,
        "batch_size": 256,
        "no decay": NoDecay(),
        "precision": Differs("bf16", "fp32", "bf16 autocast, which the papers do not use"),
    }
)
ELAS = [
    (
        "ela_*",
        f"{ELA}imagenet.py:105, 171, utils/dataloaders.py",
        PLAIN
        | {
            "augment": augment(None, 0, 0, "bilinear"),
            "test": test(224, 0.875, "bilinear"),
            "optimizer.weight_decay": 1e-4,
        },
    ),
    (
        "ela_mobilenetv2*",
        f"{ELA}imagenet.py:79-85, 413-419",
        {"model.name": "ela_mobilenetv2", "schedule": exponential(0.1, 0.1, 200)},
    ),
    ("ela_mobilenetv2", f"{ELA}checkpoints/logs", {"expected": (71.9,)}),
    ("ela_mobilenetv2_s", "arXiv:2403.01123", {"expected": (2.39,), "model.version": "s"}),
    ("ela_mobilenetv2_b", "arXiv:2403.01123", {"expected": (), "model.version": "b"}),
    ("ela_resnet*", "arXiv:1512.03385, section 3.4", {"schedule": steps(0.1, (30, 60, 90), 100)}),
    *(
        (f"ela_resnet{depth}", "arXiv:2403.01123", {"model.name": f"ela_resnet{depth}", "expected": gain})
        for depth, gain in ((18, (0.93,)), (34, ()), (50, (0.8,)), (101, ()))
    ),
]

UNKNOWN = "its rate, schedule, decay and length are not known"
ULSAMS = [
    (
        "ulsam_*",
        f"{ULSAM}; the recipe is not published",
        PLAIN
        | {
            "augment": augment(None, 0, 0),
            "test": test(224, 0.875),
            "schedule": cosine(0.05, 0.0, 150, 5, 1e-3),
            "optimizer.weight_decay": Differs(4e-5, None, UNKNOWN),
        },
    ),
    *(
        (f"ulsam_mobilenet_{kind}", ULSAM, {"model.name": f"ulsam_mobilenet_{kind}", "expected": (top1,)})
        for kind, top1 in (
            ("v1", 70.43),
            ("v1_075", 67.81),
            ("v1_050", 63.25),
            ("v2", 71.52),
            ("v2_d", 70.74),
            ("v2_f", 69.72),
        )
    ),
]


def halo(name: str, top1: float, tag: str, said: str, size: int = 256, crop: float = 0.95) -> tuple:
    return (
        name,
        f"{TIMM} timm/models/byoanet.py, results-imagenet.csv",
        {
            "model.name": name,
            "expected": (top1,),
            "model.drop_path_rate": Differs(0.05, None, said),
            "optimizer": "Lamb" if tag == "a1h" else Differs("Lamb", tag, "which is not timm's"),
            "test": test(size, crop),
        },
    )


MORE = "stronger dropout, stochastic depth and RandAugment, by amounts that are not published"
OTHER = "values for this model are not published"
HALONETS = [
    (
        "halo_[!h]*",
        RSB,
        ALONE
        | {
            "augment": augment("rand-m7-mstd0.5-inc1", 0, 0),
            "task.mixup": 0.2,
            "task.cutmix": 1.0,
            "task.smoothing": 0.1,
            "task.bce": True,
            "task.bce_threshold": Differs(0.2, None, "the paper says only that both classes count fully"),
            "optimizer.eps": 1e-6,
            "optimizer.weight_decay": 0.01,
            "optimizer.max_grad_norm": 1.0,
            "no decay": NoDecay(True),
            "batch_size": 2048,
            "repeats": 3,
            "schedule": cosine(5e-3, 1e-6, 600, 5, 1e-4),
            "precision": Differs("bf16", "fp16", "autocast is bf16, not fp16"),
        },
    ),
    halo("halo_26t", 79.1, "a1h", MORE),
    halo("halo_50ts", 81.6, "a1h", MORE, crop=0.94),
    halo("halo_se33ts", 81.0, "ra2", OTHER, crop=0.94),
    halo("halo_regnetz_b", 81.1, "ra3", OTHER, 224, 0.94),
    halo("halo_eca26ts", 79.5, "c1", OTHER, crop=0.94),
    (
        "halo_h?",
        HALONET,
        ADAMW
        | ALONE
        | {
            "optimizer": Differs("AdamW", None, "the optimizer, its rate and decay"),
            "optimizer.weight_decay": Differs(0.05, None, "the optimizer, its rate and decay"),
            "augment": Differs(
                augment("rand-m10-mstd0.5", 0.4, 0), None, "the strengths of RandAugment and stochastic depth are ours"
            ),
            "task.mixup": 0.0,
            "task.cutmix": 0.0,
            "task.bce": False,
            "task.bce_threshold": None,
            "task.smoothing": 0.1,
            "batch_size": 4096,
            "schedule": cosine(2e-3, 1e-5, 350, 10, 1e-6),
            "no decay": NoDecay(True),
            "precision": Differs("bf16", None, "bf16 autocast is ours too"),
        },
    ),
    *(
        (
            f"halo_h{i}",
            f"{HALONET}, table 5",
            {
                "model.name": f"halo_h{i}",
                "expected": (top1,),
                "model.drop_path_rate": Differs(i / 20, None, "stochastic depth are ours"),
            },
        )
        for i, top1 in enumerate((77.9, 79.9, 80.4, 81.9, 83.3, 84.0, 84.4, 84.9))
    ),
]


def nat(name: str, top1: float, drop_path: float, **more) -> tuple:
    values = {"model.name": name, "expected": (top1,), "model.drop_path_rate": drop_path}
    return name, f"{NAT}/configs/{name}.yml, README", values | more


def nat_large(name: str, top1: float, decay: float, crop: float, **more) -> tuple:
    """Trained further from ImageNet-22K; "linear" is no schedule of train.py, so the rate stays."""
    size = 384 if "384" in name else 224
    more |= {"task.mixup": 0.0, "task.cutmix": 0.0, "test": test(size, crop), "optimizer.weight_decay": decay}
    more |= {"schedule": Schedule(lambda t: 5e-5, 30), "batch_size": 512}
    return nat(name, top1, 0.35, **more)


NATS = [
    (
        "*nat*",
        f"{NAT}/train.py",
        ADAMW
        | MIXED
        | ALONE
        | {
            "augment": augment("rand-m9-mstd0.5-inc1", 0.4, 0.25, "random"),
            "test": test(224, 0.875),
            "optimizer.weight_decay": 0.05,
            "no decay": NoDecay(True),
            "batch_size": 1024,
            "clip_grad": 5.0,
            "precision": Differs("bf16", "fp16", BF16),
            "schedule": cosine(1e-3, 5e-6, 300, 20, 1e-6, 10),
            "task.bce": False,
        },
    ),
    ("*nat_iso_b", f"{NAT}/configs", {"schedule": cosine(1e-3, 5e-6, 300, 50, 1e-6, 10), "ema": dict(decay=0.9998)}),
    *(
        nat(*row)
        for row in (
            ("nat_m", 81.8, 0.2),
            ("nat_t", 83.2, 0.2),
            ("nat_s", 83.7, 0.3),
            ("nat_b", 84.3, 0.5),
            ("dinat_m", 81.8, 0.2),
            ("dinat_t", 82.7, 0.2),
            ("dinat_s", 83.8, 0.3),
            ("dinat_b", 84.4, 0.5),
            ("dinats_t", 81.8, 0.2),
            ("dinats_s", 83.5, 0.3),
            ("dinats_b", 83.8, 0.5),
            ("nat_iso_s", 80.0, 0.1),
            ("dinat_iso_s", 80.8, 0.1),
            ("nat_iso_b", 81.6, 0.4),
            ("dinat_iso_b", 82.1, 0.4),
        )
    ),
    nat_large("dinat_l", 86.6, 1e-4, 0.875),
    nat_large("dinat_l_384", 87.4, 1e-10, 1.0),
    nat_large("dinat_l_384_11x11", 87.5, 1e-10, 1.0, **{"model.name": "dinat_l_384", "model.kernel_size": 11}),
    nat_large("dinats_l", 86.5, 1e-4, 0.875),
    nat_large("dinats_l_384", 87.4, 1e-5, 1.0),
]

TABLE = [*AGENTS, *BIFORMERS, *DAVITS, *PATNETS, *SPARSIFINERS, *ELAS, *ULSAMS, *HALONETS, *NATS]
