"""Every kernel fits every card. Compiled in a process of its own: here, Triton's interpreter has the kernels."""

import json
import os
import subprocess
import sys

import pytest
from saccade.ops import aot


def listing(*args: str) -> list[aot.Usage]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "saccade.ops.aot", "--json", *args]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == any(row["problem"] for row in rows), run.stderr
    return [aot.Usage(**{key: row[key] for key in aot.Usage._fields}) for row in rows]


def fits(rows: list[aot.Usage]) -> None:
    assert all(
        row.shared > 0 for row in rows if row.operator == "bilevel_routing"
    )  # its tiles lie there; a gate's do not
    for row in rows:
        assert row.registers > 0
        assert row.shared <= aot.CARDS[row.card].shared, row
        assert row.spills == 0 or row.card != "sm_90", row


def test_half_precision_on_sm_90():
    rows = listing("--cards", "sm_90", "--dtypes", "fp16")
    fits(rows)
    assert {row.operator for row in rows} == set(aot.OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize("card", aot.CARDS)
def test_every_tile_on_every_card(card):
    fits(listing("--cards", card, "--dtypes", "fp32", "bf16"))


def test_a_problem_is_told():
    row = aot.Usage("op", "kernel", "fp16", "sm_90", "M=64", registers=255, spills=8, shared=1024)
    assert row.problem == "spills"
    assert row._replace(card="sm_80").problem == ""
    assert row._replace(card="gfx942", shared=65537).problem == "65536 bytes of shared memory is all there is"


def test_interpreted_kernels_are_refused():
    from saccade.ops.bilevel_routing import kernel
    from support.ops import DEVICE

    if DEVICE == "cuda":
        pytest.skip("kernels are compiled where there is a GPU")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: unset it"):
        aot.build(kernel.fwd_kernel, "fp16", {}, {}, "sm_90")
