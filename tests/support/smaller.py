"""Fewer and narrower blocks of the same kinds, for runs of a published recipe that take seconds."""

AGENT = dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4)
HYBRID = dict(dims=(16, 24, 32, 48), widths=(16,) * 4, heads=(2,) * 4, blocks=("C", "C", "CA", "A"))
SMALLER = {  # by the beginning of a model's name
    "agent_cswin": AGENT | dict(agent_blocks=(1, 1, 0, 0)),
    "agent_deit": dict(dim=32, depth=2, heads=2, agents=9, agent_blocks=1),
    "agent_pvt": AGENT,
    "agent_swin": AGENT | dict(agent_blocks=(1, 1, 0, 0)),
    "biformer": dict(dims=(32, 64, 64, 64), depths=(1,) * 4, n_win=2, topks=(1, 2, 4, -2)),
    "davit": dict(dims=(32, 32, 64, 64), depths=(1,) * 4),
    "ela_resnet": dict(layers=(1,) * 4, channels=(32,) * 4),
    "halo_h": HYBRID | dict(blocks=("A",) * 4),
    "halo_regnetz": dict(dims=(16, 32, 32, 48), blocks=("C", "C", "CA", "A")),
    "halo_": HYBRID,
    **{name: dict(dims=(32, 32), depths=(1, 1)) for name in ("nat_iso", "dinat_iso")},
    **{name: dict(dims=(32, 32, 64, 64), depths=(1,) * 4, kernel_size=3) for name in ("nat_", "dinat_", "dinats_")},
    "patnet": dict(dims=(8, 16, 16, 32), depths=(1,) * 4, attn_heads=2),
    "sparsifiner": dict(dim=32, depth=4, heads=2, reduce_n=2, coef_topk=3),
}


def smaller(name: str, **dense: object) -> list[str]:
    """Return overrides that make a config's model small; dense: more arguments of Agent-PVT and Agent-Swin."""
    kwargs = next((kwargs for prefix, kwargs in SMALLER.items() if name.startswith(prefix)), {})
    kwargs = kwargs | (dense if name.startswith(("agent_pvt", "agent_swin")) else {})
    return [f"model.{key}={value!r}" for key, value in kwargs.items()]
