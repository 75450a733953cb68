"""nuScenes: (configs, source, {key: published value})."""

from support.recipes import NoDecay, cosine

DFA3D = "IDEA-Research/3D-deformable-attention@cc38675 BEVFormer_DFA3D/projects/configs/bevformer"
PAPER = "arXiv:2307.12972, tables 4 and 6"
STEPS = 28_130 // 8  # samples of the training scenes, 8 GPUs of one


def row(name: str, model: str, expected: tuple, depth: bool = True, **more) -> tuple:
    small = model.endswith("_s")
    values = {
        "model.name": model,
        "expected": expected,
        "data.scale": 0.8 if small else 1.0,
        "data.frames": 3 if small else 4,
    }
    return name, f"{PAPER}; {DFA3D}", values | ({} if depth else {"model.lift_depth": False}) | more


TABLE = [
    (
        "*",
        f"{DFA3D}/bevformer_base_DFA3D.py",
        {
            "task.type": "Lift",
            "task.head": "decoder",
            "task.head_args": None,
            "task.depth_weight": 0.5,
            "task.known_depth": False,
            "model.backbone": "resnet101_dcn",
            "model.can_bus": 18,
            "model.rotation_center": (100.0, 100.0),
            "freeze": tuple(f"lifter.backbone.{part}" for part in ("conv1", "layer1", "*bn?", "*downsample.1")),
            "data.skip": True,
            "data.grid_mask": 0.7,
            "data.distort": True,
            "optimizer": "AdamW",
            "optimizer.betas": (0.9, 0.999),
            "optimizer.eps": 1e-8,
            "optimizer.weight_decay": 0.01,
            "optimizer.layer_decay": 0.1,
            "no decay": NoDecay(),
            "batch_size": 8,
            "accumulate": 1,
            "clip_grad": 35.0,
            "ema": None,
            "sync_bn": False,
            "precision": "fp32",
            "schedule": cosine(2e-4, 2e-7, 24 * STEPS, 500, 2e-4 / 3),
        },
    ),
    row("dfa3d_bev_b", "dfa3d_bev_b", (43.0, 53.1)),
    row("dfa3d_bev_b_lidar", "dfa3d_bev_b", (57.6, 63.6), **{"model.depth_network": False, "task.known_depth": True}),
    row("dfa3d_bev_s", "dfa3d_bev_s", (40.1, 50.1)),
    row("dfa2d_bev_b", "dfa3d_bev_b", (41.6, 51.7), depth=False),
    row("dfa2d_bev_s", "dfa3d_bev_s", (37.0, 47.9), depth=False),
]
