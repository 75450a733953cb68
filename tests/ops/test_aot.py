"""Every kernel fits every kind of GPU. A process of its own compiles: here, Triton's interpreter has the kernels."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from saccade.ops import aot

KERNELS = str(Path(__file__).parents[2] / "tools" / "kernels.py")


def lines(*command: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    """Run a Python command that prints JSON, with kernels that are compiled, not interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *command, "--json"], env=env, capture_output=True, text=True)
    assert run.stdout, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()], run


def listing(*args: str, command=("-m", "saccade.ops.aot")) -> list[aot.Usage]:
    rows, run = lines(*command, *args)
    assert run.returncode == any(row["problem"] for row in rows), run.stderr
    return [aot.Usage(**{key: row[key] for key in aot.Usage._fields}) for row in rows]


def fits(rows: list[aot.Usage]) -> None:
    for row in rows:
        assert row.registers > 0
        assert row.shared > 0 or row.operator != "bilevel_routing"  # its tiles are in shared memory; a gate's are not
        assert row.shared <= aot.CARDS[row.card].shared, row
        assert row.spills == 0 or row.card != "sm_90", row


def test_every_kernel_compiles():
    """Triton keeps compiled kernels in ~/.triton: a second run takes seconds."""
    rows = listing("--quick", "--cards", "sm_90", "--dtypes", "bf16")
    fits(rows)
    assert {row.operator for row in rows} == set(aot.OPERATORS)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # window attention has up to 172 kernels to compile
@pytest.mark.parametrize("operator", aot.OPERATORS)
@pytest.mark.parametrize("card", aot.CARDS)
@pytest.mark.parametrize("dtype", aot.DTYPES)
def test_every_tile_fits(operator, card, dtype):
    """Of sm_90; of the other cards each kernel's first: all that models launch there is compiled below."""
    quick = [] if card == "sm_90" else ["--quick"]
    rows = listing("--operators", operator, "--cards", card, "--dtypes", dtype, *quick)
    fits(rows)
    assert {(row.operator, row.card, row.dtype) for row in rows} == {(operator, card, dtype)}


def test_what_a_model_launches_fits():
    """A bias in a window kernel, for a card of another maker too; without padding where windows divide the maps."""
    cards = ["sm_90", "gfx942"]
    rows = listing("agent_swin_t", "--operators", "window_attention", "--cards", *cards, command=(KERNELS,))
    fits(rows)
    assert [(row.card, row.kernel) for row in rows] == [(c, k) for c in cards for k in ("fwd_kernel", "bwd_kernel")]
    assert all("PAD=False BIAS=True" in row.tile for row in rows if row.kernel == "bwd_kernel")
    assert not any(row.spills for row in rows)


FAMILIES = ["agent_*", "biformer_*", "davit_*", "dfa3d_*", "*nat*", "ela_*", "halo_*", "patnet_*", "sparsifiner_*"]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("card", aot.CARDS)
@pytest.mark.parametrize("family", [*FAMILIES, "ulsam_*"])
def test_what_every_model_launches_fits(family, card):
    rows = listing(family, "--cards", card, command=(KERNELS,))
    fits(rows)
    assert {row.card for row in rows} == {card}


def compilations(model: str, sizes: list[tuple[int, int]]) -> list[int]:
    """Return how many kernels each image size adds."""
    rows, _ = lines(KERNELS, model, "--compilations", "--sizes", *(f"{h}x{w}" for h, w in sizes))
    assert [row["size"] for row in rows] == [f"{h}x{w}" for h, w in sizes]
    assert rows[0]["kernels"] == rows[0]["new"] > 0
    return [row["new"] for row in rows]


# As detectors pad their images: the shorter side from 544 to 800, the longer one to 1344.
TWO = [(544, 544), (608, 768)]  # of which one is aligned at every stage
DETECTION = [(h, 32 * round(h * ratio / 32)) for h in range(544, 801, 32) for ratio in (1.25, 1.33, 1.5, 1.66)][:30]


def test_image_sizes_add_no_compilation():
    assert compilations("ela_resnet18", [*TWO, (800, 1344)])[2:] == [0]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # a second of CPU time per size and model
@pytest.mark.parametrize(
    "model",
    ["biformer_t", "davit_t", "ela_resnet34", "halo_26t", "halo_h0", "nat_t", "patnet_t1", "ulsam_mobilenet_v1"],
)
def test_thirty_image_sizes_compile_no_more_than_two(model):
    # DaViT's windows divide one of the sizes: there they have no padding. NAT's tiles of keys are seen by most queries
    # beside the edge of one.
    two = {"davit_t": [(672, 896), (608, 768)], "nat_t": [(544, 544), (544, 736)]}.get(model, TWO)
    assert sum(compilations(model, [*two, *DETECTION])[2:]) == 0


def test_a_problem_is_told():
    row = aot.Usage("op", "kernel", "fp16", "sm_90", "M=64", registers=255, spills=8, shared=1024, warps=4)
    assert row.problem == "spills"
    assert row._replace(card="sm_80").problem == ""
    assert row._replace(card="gfx942", shared=65537).problem == "more than the 65536 bytes of shared memory per program"


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 1.0),
        (33, 0, 4, 12 * 4 / 64),  # 40 x 128 of 65536 registers
        (255, 0, 8, 8 / 64),
        (32, 100 << 10, 4, 2 * 4 / 64),  # twice in 228 KiB
        (16, 0, 1, 32 / 64),  # 32 programs at most
    ],
)
def test_occupancy(registers, shared, warps, expected):
    row = aot.Usage("op", "kernel", "fp16", "sm_90", "", registers, 0, shared, warps)
    assert row.occupancy == expected
    assert row._replace(card="gfx942").occupancy is None


def test_interpreted_kernels_are_refused():
    from saccade.ops.bilevel_routing import kernel
    from support.ops import DEVICE

    if DEVICE == "cuda":
        pytest.skip("kernels are compiled where there is a GPU")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: unset it"):
        aot.build(kernel.fwd_kernel, "fp16", {}, {}, "sm_90")


def shared_starts(source: str) -> list[tuple[str, int, set[str]]]:
    """Return (function, line, names) where variables that a loop reassigns begin as one tensor under several names."""
    result = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or "jit" not in "".join(map(ast.unparse, function.decorator_list)):
            continue
        for loop in (node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While))):
            within = [node for node in ast.walk(loop) if isinstance(node, ast.Name)]
            reassigned = {node.id for node in within if isinstance(node.ctx, ast.Store)}
            same: dict[str, set[str]] = {}  # of each name, those that were last assigned it
            for node in ast.walk(function):
                if not isinstance(node, ast.Assign) or node.lineno >= loop.lineno:
                    continue
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts))
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and isinstance(value, ast.Name):
                            same.setdefault(value.id, {value.id}).add(name.id)
            groups = [names & reassigned for names in same.values()]
            result += [(function.name, loop.lineno, names) for names in groups if len(names) > 1]
    return result


def test_no_loop_swaps_two_names_of_one_tensor():
    """Triton 3.6 takes the second name for unchanged by the loop, without a word; the interpreter does not."""
    swapped = "@triton.jit\ndef f(x):\n    a, b = x, x\n    for i in range(3):\n        a, b = b, a + 1\n"
    assert shared_starts(swapped) == [("f", 4, {"a", "b"})]
    assert shared_starts(swapped.replace("x, x", "x, x + 0")) == []
    kernels = sorted(Path(aot.__file__).parent.glob("*/kernel.py"))
    assert len(kernels) == len(aot.OPERATORS)
    for kernel in kernels:
        assert shared_starts(kernel.read_text()) == [], kernel
