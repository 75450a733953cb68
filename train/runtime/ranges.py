"""Ranges of the numbers in a config that are passed to timm and torch, whose annotations give none."""

from typing import Any

from .config import Range
from .errors import UserError

_POSITIVE, _NON_NEGATIVE, _FRACTION = Range(0, open_low=True), Range(0), Range(0, 1)
_BELOW_ONE = Range(0, 1, open_high=True)

OPTIMIZER = dict(
    lr=_POSITIVE,
    weight_decay=_NON_NEGATIVE,
    momentum=_BELOW_ONE,
    dampening=_FRACTION,
    betas=_BELOW_ONE,
    beta=_BELOW_ONE,
    alpha=_FRACTION,
    eps=_NON_NEGATIVE,
    layer_decay=Range(0, 1, open_low=True),
    layer_decay_min_scale=_FRACTION,
)
SCHEDULE = dict(
    warmup_epochs=_NON_NEGATIVE,
    warmup_lr=_NON_NEGATIVE,
    min_lr=_NON_NEGATIVE,
    cooldown_epochs=_NON_NEGATIVE,
    patience_epochs=_NON_NEGATIVE,
    decay_epochs=_POSITIVE,
    decay_milestones=_NON_NEGATIVE,
    decay_rate=_POSITIVE,
    noise=_NON_NEGATIVE,
    noise_pct=_FRACTION,
    noise_std=_NON_NEGATIVE,
    noise_seed=_NON_NEGATIVE,
    cycle_mul=_POSITIVE,
    cycle_decay=Range(0, 1, open_low=True),
    cycle_limit=Range(1),
    k_decay=_POSITIVE,
    stable_timescale=_POSITIVE,
)
EMA = dict(
    decay=_FRACTION,
    min_decay=_FRACTION,
    update_after_step=_NON_NEGATIVE,
    warmup_gamma=_POSITIVE,
    warmup_power=_POSITIVE,
    stochastic_rounding_seed=_NON_NEGATIVE,
)
AUGMENT = dict(  # of timm.data.create_transform
    scale=Range(0, 1, open_low=True),
    ratio=_POSITIVE,
    hflip=_FRACTION,
    vflip=_FRACTION,
    color_jitter=_NON_NEGATIVE,
    color_jitter_prob=_FRACTION,
    grayscale_prob=_FRACTION,
    gaussian_blur_prob=_FRACTION,
    re_prob=_FRACTION,
    re_count=Range(1),
    re_num_splits=_NON_NEGATIVE,
)


def check_model(settings: dict[str, Any]) -> None:
    """Check the numbers of the model section that all models share: drop rates, sizes, channels.

    Raises UserError for one out of range. The model itself checks its other arguments when it is built.
    """
    for key, value in settings.items():
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        if "drop" in key:
            allowed = _BELOW_ONE
        elif key in ("in_chans", "img_size", "output_stride"):
            allowed = Range(1)
        else:
            continue
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number not in allowed:
                raise UserError(f"model.{key} must be {allowed}; got {value!r}")


def warmup_message(config: dict[str, Any]) -> list[str]:
    """Return a message where the learning rate never reaches optimizer.lr, as warm-up takes the whole run."""
    schedule, length = config["schedule"], config["epochs"] or config["iterations"]
    warmup = 0 if schedule.get("warmup_prefix") or schedule.get("sched") == "none" else schedule.get("warmup_epochs", 0)
    if warmup < length:
        return []
    key = "epochs" if config["epochs"] else "iterations"
    return [
        f"schedule.warmup_epochs={warmup} takes the whole run ({key}={length}): the learning rate stays below "
        "optimizer.lr; give a shorter warm-up or a longer run"
    ]
