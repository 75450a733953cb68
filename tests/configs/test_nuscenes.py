"""nuScenes' recipes: what is built. test_tables.py compares them with the published ones."""

import pytest
from saccade.train.models.freeze import freeze
from support import recipes
from timm.optim import create_optimizer_v2


@pytest.mark.parametrize(
    ("name", "strides", "cells", "layers"),
    [("dfa3d_bev_b", (8, 16, 32, 64), (200, 200), 6), ("dfa3d_bev_s", (32,), (150, 150), 3)],
)
def test_what_is_built(name, strides, cells, layers):
    """Sizes of the lifter and its head, what is frozen, and the backbone's share of the learning rate."""
    settings = recipes.load(f"nuscenes/{name}")
    net = recipes.model(f"nuscenes/{name}")
    assert net.lifter.strides == strides and net.lifter.bev_size == cells and len(net.lifter.encoder.layers) == layers
    assert net.head.query.weight.shape == (900, 512) and len(net.head.layers) == 6
    try:
        frozen = freeze(net, settings["freeze"])
        learning = {key for key, parameter in net.named_parameters() if parameter.requires_grad}
        backbone = {key for key, _ in net.named_parameters() if key.startswith("lifter.backbone.")}
        biases = {key for key in backbone if key.endswith(".conv_offset.bias")}
        convolutions = {key for key in backbone & learning if net.get_parameter(key).ndim == 4}
        assert backbone & learning == convolutions | biases and len(biases) == 26
        assert {key.split(".")[2] for key in convolutions} == {"layer2", "layer3", "layer4"}
        norms = [
            module
            for key, module in net.named_modules()
            if key.startswith("lifter.backbone.") and ("bn" in key or "downsample.1" in key)
        ]
        kept = {id(part) for module in frozen for part in module.modules()}
        assert norms and all(id(norm) in kept for norm in norms)
        for group in create_optimizer_v2(net, **settings["optimizer"]).param_groups:
            ours = {id(parameter) for parameter in group["params"]}
            assert all(
                (id(p) in ours) <= ((group["lr_scale"] == 0.1) == (key in backbone))
                for key, p in net.named_parameters()
            )
    finally:
        net.requires_grad_(True)


def test_lidar_depth_replaces_the_network():
    assert recipes.model("nuscenes/dfa3d_bev_b_lidar").lifter.depth is None
    assert recipes.model("nuscenes/dfa2d_bev_b").lifter.depth is None
    assert recipes.model("nuscenes/dfa3d_bev_b").lifter.depth is not None
