"""MobileNetV1 and V2 as timm's EfficientNet builds them, of any width: the hosts of ULSAM and ELA."""

import re
from functools import partial

from timm.models import EfficientNet
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import Tensor, nn

from .attention_maps import HasAttentionMaps
from .layers import channels_last
from .published import complete, rename_key

STAGES = {  # by generation; in timm's notation, a stage for each line of the papers' tables
    1: ("dsa_r1_k3_s1_c64", "dsa_r2_k3_s2_c128", "dsa_r2_k3_s2_c256", "dsa_r6_k3_s2_c512", "dsa_r2_k3_s2_c1024"),
    2: (
        "ds_r1_k3_s1_c16",
        "ir_r2_k3_s2_e6_c24",
        "ir_r3_k3_s2_e6_c32",
        "ir_r4_k3_s2_e6_c64",
        "ir_r3_k3_s1_e6_c96",
        "ir_r3_k3_s2_e6_c160",
        "ir_r1_k3_s1_e6_c320",
    ),
}


class Stem(nn.Conv2d):
    """The first convolution, on the image in channels-last memory format, which the maps after it keep."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(channels_last(x), self.weight, self.bias)


class MobileNet(HasAttentionMaps, EfficientNet):
    """MobileNet of `generation` 1 or 2, with `width` times the paper's channels. The other arguments are timm's."""

    def __init__(
        self,
        generation: int,
        width: float,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        output_stride: int,
        drop_rate: float,
        drop_path_rate: float,
        device=None,
        dtype=None,
    ):
        super().__init__(
            block_args=decode_arch_def([[stage] for stage in STAGES[generation]]),
            num_features=round_channels(1280, max(1.0, width)) if generation == 2 else 0,
            round_chs_fn=partial(round_channels, multiplier=width),
            act_layer=nn.ReLU6,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            output_stride=output_stride,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.conv_stem.__class__ = Stem  # timm builds it, and offers no choice of its class


def map_state_dict(state_dict: dict[str, Tensor], model: MobileNet, first: dict, others: dict) -> dict[str, Tensor]:
    """Convert a published state dict to the model's keys.

    `first` and `others` map the published numbers of a block's parts to our names, in the first block and in the
    others. If the file has no classifier, the model's own is kept.

    The published networks have stem, blocks and (torchvision's) head in one sequence: features.0, features.1 and so on.
    """
    names = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]  # type: ignore[arg-type]
    ends = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
    ends |= {f"features.{len(names) + 1}.0": "conv_head", f"features.{len(names) + 1}.1": "bn2"}
    ends |= {"conv.0": "conv_head", "conv.1": "bn2"}
    rules = [(rf"^{re.escape(theirs)}\.", f"{ours}.") for theirs, ours in ends.items()]
    rules += [(rf"^features\.{n}\.", f"{name}.") for n, name in enumerate(names, 1)]
    rules += [(rf"^(blocks\.0\.0)\.conv\.{re.escape(part)}\.", rf"\1.{ours}.") for part, ours in first.items()]
    rules += [(rf"\.conv\.{re.escape(part)}\.", f".{ours}.") for part, ours in others.items()]
    own = {key: value for key, value in model.state_dict().items() if key.startswith("classifier.")}
    return complete(own | {rename_key(key, rules): value for key, value in state_dict.items()}, model, "blocks.")
