"""tools/kernel_bounds.py: the loops, instructions and bytes that it counts, on texts with known answers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]

TTIR = """#loc = loc("kernel.py":1:0)
#loc1 = loc("kernel.py":10:4)
#loc2 = loc("kernel.py":11:8)
#loc3 = loc("tiles.py":5:8)
#loc4 = loc(callsite(#loc3 at #loc2))
#loc5 = loc("kernel.py":20:8)
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16> loc("x_ptr"(#loc)), %y_ptr: !tt.ptr<f32> loc("y_ptr"(#loc)), %unused_ptr: !tt.ptr<f32> loc("unused_ptr"(#loc)), %N: i32 loc("N"(#loc)), %per: i32 loc("per"(#loc))) attributes {noinline = false} {
    %c32_i32 = arith.constant 32 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c-256_i32 = arith.constant -256 : i32 loc(#loc1)
    %cst = arith.constant 1.5 : f32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %0 = arith.muli %pid, %per : i32 loc(#loc1)
    %1 = arith.subi %0, %c-256_i32 : i32 loc(#loc1)
    %last = arith.minsi %1, %N : i32 loc(#loc1)
    %p = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<32x!tt.ptr<bf16>> loc(#loc1)
    %acc:2 = scf.for %i = %0 to %last step %c32_i32 iter_args(%q = %p, %a = %cst) -> (tensor<32x!tt.ptr<bf16>>, f32)  : i32 {
      %v = tt.load %q : tensor<32x!tt.ptr<bf16>> loc(#loc4)
      %n = arith.remsi %i, %c32_i32 : i32 loc(#loc2)
      %inner = scf.for %j = %c0_i32 to %n step %c32_i32 iter_args(%b = %a) -> (f32)  : i32 {
        scf.yield %b : f32 loc(#loc2)
      } loc(#loc2)
      scf.yield %q, %inner : tensor<32x!tt.ptr<bf16>>, f32 loc(#loc2)
    } loc(#loc1)
    %nan = arith.cmpf une, %cst, %cst : f32 loc(#loc5)
    %r = scf.if %nan -> (f32) {
      %again = scf.for %j = %c0_i32 to %N step %c32_i32 iter_args(%b = %cst) -> (f32)  : i32 {
        scf.yield %b : f32 loc(#loc5)
      } loc(#loc5)
      scf.yield %again : f32 loc(#loc5)
    } else {
      scf.yield %cst : f32 loc(#loc5)
    } loc(#loc5)
    %t = tt.load %y_ptr : !tt.ptr<f32> loc(#loc5)
    %m = arith.fptosi %t : f32 to i32 loc(#loc5)
    scf.for %j = %c0_i32 to %m step %c32_i32  : i32 {
      tt.store %y_ptr, %cst : !tt.ptr<f32> loc(#loc5)
    } loc(#loc5)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501

SASS = """
        //## File "kernel.py", line 1
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_0:
        //## File "kernel.py", line 11
        /*0010*/                   LDG.E R2, [R4.64] ;
        //## File "tiles.py", line 5
        /*0020*/                   FADD R3, R3, R2 ;
        /*0030*/                   VIADD R6, R6, 0x80 ;
        /*0040*/                   ISETP.GE.AND P0, PT, R6, R7, PT ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   FADD R3, R3, R2 ;
        /*0070*/                   VIADD R6, R6, 0x20 ;
        /*0080*/                   ISETP.GE.AND P1, PT, R6, R7, PT ;
        /*0090*/              @!P1 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP ;
"""


@pytest.fixture(scope="module")
def bounds():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("kernel_bounds", ROOT / "tools" / "kernel_bounds.py")
        module = sys.modules["kernel_bounds"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


def test_loops_run_as_often_as_their_arguments_say(bounds):
    source = bounds.read_source(TTIR, dict(N=1000, per=256), [0, 3])
    outer, inner, again, by_data = source.loops
    # Of 1000 in parts of 256, the first has 256, the fourth 232: 8 steps of 32 each. Remainders of 32 are 0.
    assert (outer.iterations, outer.step, outer.lines) == (8, 32, {"kernel.py:11", "tiles.py:5"})
    assert [loop.depth for loop in source.loops] == [0, 1, 0, 0]
    assert (inner.iterations, again.iterations, by_data.iterations) == (0, 0, None)  # `again` is for NaN alone
    assert (source.read, source.written) == ({"x_ptr", "y_ptr"}, {"y_ptr"})


def test_negative_numbers_divide_as_in_c(bounds):
    divide, rest = bounds.ARITHMETIC["divsi"], bounds.ARITHMETIC["remsi"]
    assert [(divide(a, b), rest(a, b)) for a, b in ((7, 2), (-7, 2), (7, -2), (-7, -2))] == [
        (3, 1), (-3, -1), (-3, 1), (3, -1)
    ]  # fmt: skip


def test_instructions_are_counted_as_often_as_their_loops_run(bounds):
    instructions, cycles = bounds.read_sass(SASS)
    assert len(instructions) == 11
    assert [(c.start, c.stop) for c in cycles] == [(1, 5), (6, 9)]
    assert [bounds.unrolled(instructions, c, 32) for c in cycles] == [4, 1]
    loop = bounds.Loop(11, 32, frozenset({"kernel.py:11", "tiles.py:5"}))
    executed, known = bounds.weights(instructions, cycles, [loop])
    assert executed == [1] + 5 * [2] + 4 * [3] + [1]  # 11 iterations: twice four at a time, three that remain
    assert known
    assert not bounds.weights(instructions, cycles, [loop._replace(iterations=None)])[1]
    product = [one._replace(text=one.text.replace("FADD", "HMMA.16816.F32")) for one in instructions]
    assert [bounds.unrolled(product, c, 32) for c in cycles] == [1, 1]  # what it counts ahead is loaded in advance


def test_bytes_are_those_read_and_those_written_once(bounds):
    x = torch.empty(4, 3, 8, dtype=torch.bfloat16)
    given = {name: bounds.Pointer(t) for name, t in dict(q_ptr=x, k_ptr=x, dqkv_ptr=x, lse_ptr=x[0]).items()}
    kernel = SimpleNamespace(__name__="dq_kernel", arg_names=list(given))
    launch = bounds.Launch(kernel, (1,), tuple(given.values()), {})
    source = bounds.Source([], {"q_ptr", "k_ptr", "lse_ptr"}, {"dqkv_ptr"})
    # x once, though it is given twice; a view of it, which begins where x does, is a part of it; a third is written.
    assert bounds.moved_bytes(launch, source) == 192 + 192 / 3
    assert bounds.moved_bytes(launch, bounds.Source([], {"lse_ptr"}, set())) == 48


def test_programs_are_sampled(bounds):
    assert bounds.sampled(3) == [0, 1, 2]
    some = bounds.sampled(6400)
    assert len(set(some)) == 64 and 0 <= min(some) < 1000 and 5400 < max(some) < 6400
    assert some == bounds.sampled(6400)


def test_the_page_says_what_it_is(bounds):
    row = bounds.Bound("op.kernel", 2, 100.0, 30.0, 10.0, 64, 0, 2048, 4, True)
    rows = bounds.by_kernel(
        [row, row._replace(launches=1, issue=5.0, registers=80, known=False), row._replace(kernel="op.b")]
    )
    assert [(r.kernel, r.launches, r.issue, r.floor, r.registers, r.known) for r in rows] == [
        ("op.b", 2, 60.0, 20.0, 64, True), ("op.kernel", 3, 65.0, 30.0, 80, False)
    ]  # fmt: skip
    text = bounds.page(dict(model=rows), "python tools/kernel_bounds.py", "batch 2")
    assert "These are bounds, not measurements" in text
    assert "| op.kernel * | 3 | 65 | 30 | 2.2 | 80 | 0 | 2.0 | 4 |" in text
    assert "| all | 5 | 125 | 50 | 2.5 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "MODEL must be a model of this package, got resnet18"),
        (["davit_t", "--operators", "window"], "--operators must be of agent_attention, .*, got window"),
        (["--batch", "0"], "--batch and --size must be positive"),
        (["--size", "224"], "--batch and --size must be positive"),
    ],
)
def test_mistakes(bounds, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        bounds.main(arguments)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.exhaustive
def test_a_model_in_full():
    """DaViT's windows at its first stage: the floor is q, k, v and the output, with the log-sum-exps, at 4.3 TB/s."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/kernel_bounds.py", "davit_t", "--operators", "window_attention", "--launches"]
    run = subprocess.run([*command, "--json"], cwd=ROOT, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stderr
    assert sorted(row["launches"] for row in rows) == 6 * [1] + 2 * [3]  # forward and backward of four stages
    first = max((row for row in rows if row["kernel"] == "window_attention.fwd_kernel"), key=lambda row: row["floor"])
    tokens = 128 * 56 * 56
    assert first["floor"] == pytest.approx(1e6 * tokens * (4 * 96 * 2 + 3 * 4) / 4.3e12, rel=0.001)
    assert first["known"] and first["spills"] == 0
    assert 0.5 < first["issue"] / first["floor"] < 3
