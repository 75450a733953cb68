"""Subspace gate: the reference against loops and the published values, the other forms against it, and the contract."""

import math

import pytest
import torch
from saccade.ops import backend, subspace_gate
from saccade.ops.subspace_gate import eager, kernel, op, reference
from support import budget, parity
from support.budget import assert_close
from support.ops import (
    COMPILED,
    DEVICE,
    DTYPES,
    FULL,
    autocast_changes_nothing,
    check,
    evaluate,
    far_apart,
    flops,
    forced,
    gradients_are_right,
    grid,
    keeps_memory_format,
    rand,
    reads_any_gradient,
    refuses,
    refuses_second_derivative,
    registers,
)

torch.set_num_threads(1)

#          B, C, H, W, subspaces
SHAPES = [
    (2, 12, 5, 7, 1),
    (3, 5, 1, 9, 1),  # one row
    (1, 12, 3, 1, 4),  # one column, three channels a subspace
    (2, 2, 2, 2, 2),  # of one channel
    (1, 36, 9, 8, 2),  # more than one tile of channels
    (1, 1, 33, 65, 1),  # and of rows and columns
]
FIXTURES = ["ulsam_c32_g1", "ulsam_c64_g4", "ulsam_c64_g2_rect", "ulsam_c96_g16", "ulsam_c160_g8"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
PARTS = dict(
    conv_dws=("weight", "bias"), bn_dws=("weight", "bias"), conv_point=("weight", "bias"), bn_point=("weight", "bias")
)  # the published names of the eight parameters, in our order


@pytest.fixture(autouse=True, scope="module")
def larger_tiles():
    """The interpreter takes as long for a small tile as for a large one."""
    chosen = dict(kernel.TILES)
    if DEVICE == "cpu":
        kernel.TILES.update(dict.fromkeys(chosen, (1024, 4)))
    yield
    kernel.TILES.update(chosen)


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    """x, the eight parameters and the four running statistics."""
    B, C, H, W, g = shape
    x = rand((B, C, H, W), dtype).contiguous(memory_format=layout)
    channel = [rand((C,), torch.float64, seed) for seed in range(1, 8)]
    point = [rand((g,), torch.float64, seed) for seed in range(8, 13)]
    parameters = [channel[0], channel[1], 1 + channel[2] / 4, channel[3] / 4, channel[4] * (g / C) ** 0.5]
    parameters += [point[0] / 4, 1 + point[1].abs() / 4, 0.5 + point[2] / 4]
    running = [channel[5] / 4, 1 + channel[6].abs(), point[3] / 4, 1 + point[4].abs()]
    return x, *(t.to(dtype) for t in (*parameters, *running))


plain, triton = forced(subspace_gate, "torch"), forced(subspace_gate, "triton")


def with_statistics(f, training: bool):
    """f as a function of x and the parameters alone; in training, of which the new running statistics come out too."""

    def run(x, *args):
        parameters, running = args[:8], [t.detach().clone() for t in args[8:]]
        return f(x, *parameters, *running, training)

    return run


def results(f, args, training: bool, mode=None):
    """Return the output, the gradients of x and of the parameters, and the running statistics afterwards."""
    x, *rest = args
    running = [t.clone() for t in rest[8:]]
    return evaluate(lambda *leaves: f(*leaves, *running, training), (x, *rest[:8]), mode=mode) + [
        t.double() for t in running
    ]


def check_results(f, args, training: bool) -> None:
    """Check `results` of f against the definition's in float64, within the budget of `support.budget`."""
    wide = [*args[:9], *(t.float() for t in args[9:])]  # running statistics

    def definition(args, mode=None):
        return results(eager.definition, args, training, mode)

    budget.assert_within(
        results(f, args, training),
        exact=definition([t.double() for t in args]),
        samples=budget.simulate(lambda mode: definition(wide, mode)),
        plain=definition(wide),
        u=torch.finfo(args[0].dtype).eps,  # running statistics are rounded twice
    )


def loops(x, w, b, nw, nb, pw, pb, pnw, pnb, rm, rv, prm, prv, training, eps=1e-5):
    """Channel by channel, position by position."""
    (B, C, H, W), g = x.shape, pb.shape[0]
    G, y = C // g, torch.empty_like(x)
    if training:
        a = x * w[:, None, None] + b[:, None, None]
        rm, rv = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
    s = torch.zeros(B, g, H, W, dtype=x.dtype)
    for i in range(B):
        for c in range(C):
            a = ((x[i, c] * w[c] + b[c] - rm[c]) / (rv[c] + eps).sqrt() * nw[c] + nb[c]).clamp(min=0)
            for h in range(H):
                for v in range(W):
                    s[i, c // G, h, v] += pw[c] * a[max(h - 1, 0) : h + 2, max(v - 1, 0) : v + 2].max()
    s += pb[:, None, None]
    if training:
        prm, prv = s.mean((0, 2, 3)), s.var((0, 2, 3), correction=0)
    for i in range(B):
        for n in range(g):
            t = ((s[i, n] - prm[n]) / (prv[n] + eps).sqrt() * pnw[n] + pnb[n]).clamp(min=0).exp()
            for c in range(n * G, (n + 1) * G):
                y[i, c] = x[i, c] + x[i, c] * t / t.sum()
    return y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 3, 4, 2), (3, 3, 1, 5, 3)], ids=str)
def test_reference_is_the_definition(shape, training):
    args = inputs(shape, torch.float64)
    expected = loops(*(t.cpu() for t in args), training)
    assert_close(with_statistics(reference.subspace_gate, training)(*args).cpu(), expected)


@pytest.mark.parametrize("f", [reference.subspace_gate, plain], ids=["reference", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [*FIXTURES, "ulsam_c32_g4_train"])
def test_published_values(name, layout, f):
    fixture, training = parity.load("ulsam", name), name.endswith("train")
    prefix = "m.subspaces" if training else "subspaces"
    state = parity.weights(fixture)
    g = sum(key.endswith("conv_point.bias") for key in state)

    def flat(key):
        return torch.cat([state[f"{prefix}.{n}.{key}"].flatten() for n in range(g)])

    parameters = [flat(f"{part}.{which}").requires_grad_() for part in PARTS for which in PARTS[part]]
    # bn_dws before conv_point, as our arguments go: weight, bias of the convolution, then of its norm
    running = [flat(f"bn_{part}.running_{which}") for part in ("dws", "point") for which in ("mean", "var")]
    x = parity.image(fixture).contiguous(memory_format=layout).requires_grad_()
    out = f(x, *parameters, *running, training)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    if training:
        G = len(running[0]) // g
        for name, r in (("mean", running[0][:G]), ("var", running[1][:G]), ("var_point", running[3][:1])):
            parity.assert_equal(name, r, fixture["outputs"][f"running_{name}_after"])
    names = [f"{part}.{which}" for part in PARTS for which in PARTS[part]]
    ours = {
        f"{prefix}.{n}.{name}": p.grad.view(g, -1)[n].norm().item()
        for name, p in zip(names, parameters)
        for n in range(g)
    }
    assert set(ours) == set(fixture["grads"])
    largest = max(fixture["grads"].values())
    for key, expected in fixture["grads"].items():
        assert abs(ours[key] - expected) <= 1e-9 * max(expected, 1e-3 * largest), key


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_matches_reference(shape, layout, training):
    args = inputs(shape, torch.float64, layout)
    for ours, exact in zip(results(plain, args, training), results(reference.subspace_gate, args, training)):
        assert_close(ours, exact)


@grid(also=[(SHAPES[4], LAYOUTS[1], True)], shape=SHAPES, layout=LAYOUTS, training=[True, False])
def test_triton_matches_reference(shape, layout, training):
    check_results(triton, inputs(shape, torch.float32, layout), training)


def halves(shape, dtype, layout):
    """Values and parameters that half precision holds, and in which no two neighbours tie."""
    B, C, H, W, _ = shape
    _, *rest = inputs(shape, torch.float64, layout)
    order = rand((B * C, H * W), seed=20).argsort(1).double().view(B, C, H, W) / (H * W) * 4 - 2
    return order.to(dtype).contiguous(memory_format=layout), *(t.to(dtype) for t in rest)


@grid(dtype=[t for t in DTYPES if t != torch.float32], training=[True, False], layout=LAYOUTS, f=[triton, plain])
def test_half_precision(training, layout, f, dtype):
    check_results(f, halves(SHAPES[0], dtype, layout), training)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_the_first_of_equal_maxima_gets_the_gradient(f):
    args = inputs((1, 3, 6, 5, 1), torch.float32)
    x = (rand((1, 3, 6, 5)) * 2).round() / 2  # many ties
    for ours, exact in zip(results(f, (x, *args[1:]), False), results(reference.subspace_gate, (x, *args[1:]), False)):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)  # a tie decided otherwise is off by far more


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("training", [False, True])
def test_parameters_of_another_type(training, f):
    x, *rest = inputs(SHAPES[0])
    x = x.half().float()
    exact, ours = results(f, (x, *rest), training), results(f, (x.half(), *rest), training)
    for got, expected in zip(ours, exact):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)  # x and y rounded to float16
    leaf = rest[0].clone().requires_grad_()
    y = f(x.half(), leaf, *rest[1:], training)
    y.sum().backward()
    assert (y.dtype, leaf.grad.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_memory_format_is_kept(f, layout):
    x, *rest = inputs(SHAPES[0], layout=layout)
    keeps_memory_format(lambda x: f(x, *rest), x)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reads_a_view_of_a_bigger_map(f, layout):
    _, *rest = inputs(SHAPES[0])
    big = rand((2, 17, 8, 15)).contiguous(memory_format=layout)

    def of_view(f):
        return lambda big: f(big[:, 3:15, 1:-2, ::2][..., :7], *(t.to(big.dtype) for t in rest))

    check(of_view(f), of_view(reference.subspace_gate), big)


def test_functional_gradients_in_eval_mode_are_the_same_bits():
    x, *rest = inputs(SHAPES[0], layout=torch.channels_last)

    def loss(x):
        return subspace_gate(x, *rest).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)


def test_gradient_of_another_memory_format():
    x, *rest = inputs(SHAPES[0])

    def of_x(f):
        return lambda x: f(x, *(t.to(x.dtype) for t in rest))

    reads_any_gradient(of_x(triton), of_x(reference.subspace_gate), x)


def test_offsets_beyond_31_bits(tmp_path):
    """Images 2**31 elements apart; and one that reaches too far."""
    x, *rest = inputs((2, 4, 3, 3, 2))
    x = x.half()
    size = 2**31 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(x.shape, (2**31, 9, 3, 1))
    apart.copy_(x)
    assert torch.equal(triton(apart, *rest), triton(x, *rest))
    far = big.as_strided((1, 2, 2, 2), (1, 2**31, 2, 1))
    with pytest.raises(RuntimeError, match=r"an image that spans 2\*\*31 elements"):
        triton(far, *(t[: len(t) // 2] for t in rest))


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_nan_stays_in_its_image(f):
    x, *rest = inputs(SHAPES[1])
    clean = results(f, (x, *rest), False)
    x = x.clone()
    x[1, 3, 0, 4] = math.nan
    for ours, exact in zip(results(f, (x, *rest), False)[:2], clean[:2]):
        assert ours[1].isnan().any()
        assert torch.equal(ours[[0, 2]], exact[[0, 2]])
    assert f(x, *rest)[1].isnan().all()  # the softmax of its one subspace


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_one_position_is_doubled(f):
    args = inputs((3, 8, 1, 1, 2))
    out, _, *others = results(f, args, False)
    assert_close(out, 2 * args[0].double())
    assert not any(d.any() for d in others[:8])


def test_running_statistics_are_optional_and_keep_their_type():
    x, *rest = inputs(SHAPES[0])
    running = [t.clone() for t in rest[8:]]
    y = plain(x, *rest[:8], *running, True, momentum=0.25)
    assert torch.equal(plain(x, *rest[:8], training=True), y)
    full = plain_running = [t.clone() for t in rest[8:]]
    plain(x, *rest[:8], *full, True, momentum=1.0)
    for new, old, batch in zip(running, rest[8:], plain_running):
        assert_close(new, 0.75 * old + 0.25 * batch)
    assert all(torch.equal(a, b) for a, b in zip(rest[8:], inputs(SHAPES[0])[9:]))


BAD = {
    "rank": (dict(x=rand((12, 5, 7))), r"x must be .*\(B, C, H, W\), got torch.float32 of shape \(12, 5, 7\)"),
    "integers": (dict(x=torch.ones(2, 12, 5, 7, dtype=torch.int64)), "x must be floating point .* got torch.int64"),
    "subspaces": (dict(point_bias=rand((5,))), "point_bias must have .* C = 12 channels of x, got 5"),
    "weight": (dict(weight=rand((12, 1))), r"weight must be \(12,\), got \(12, 1\)"),
    "point_weight": (dict(point_weight=rand((2,))), r"point_weight must be \(12,\), got \(2,\)"),
    "point_norm": (dict(point_norm_bias=rand((12,))), r"point_norm_bias must be \(1,\), got \(12,\)"),
    "missing": (dict(running_var=None), "running_var must be given unless training, got None"),
    "device": (dict(norm_bias=torch.ones(12, device="meta")), "norm_bias must be on .* as x is, got meta"),
    "dtype": (dict(bias=torch.ones(12, dtype=torch.int32)), "bias must be floating point, got torch.int32"),
    "one value": (dict(x=rand((1, 12, 1, 1)), training=True), r"training needs more .* got x of shape \(1, 12, 1, 1\)"),
}
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "point_weight", "point_bias", "point_norm_weight")
NAMES += ("point_norm_bias", "running_mean", "running_var", "point_running_mean", "point_running_var")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(subspace_gate, message, **dict(zip(NAMES, inputs(SHAPES[0]))) | change)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("B, H, W", [(0, 6, 5), (2, 0, 5), (2, 6, 0)])
def test_nothing_in_nothing_out(B, H, W, training, f):
    args = inputs((B, 8, H, W, 2))
    leaves = [t.requires_grad_() for t in args[:9]]
    out = f(*leaves, *args[9:], training)
    assert out.shape == args[0].shape
    out.sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape
    assert not leaves[5].grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_runs_are_equal_to_the_bit(training):
    first, *others = (results(triton, inputs(SHAPES[0]), training) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_map_but_the_result_is_made(monkeypatch):
    made = []
    for name in ("empty_like", "empty", "zeros_like"):
        whole = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, whole=whole, **k: made.append(whole(*a, **k)) or made[-1])
    x, *rest = inputs((2, 32, 5, 7, 2))
    triton(x, *rest)
    assert sum(t.numel() >= x.numel() for t in made) == 1


@FULL
def test_registration(full):
    x, *rest = inputs((1, 2, 2, 2, 1))  # the interpreter runs each kernel dozens of times here
    last = x.contiguous(memory_format=torch.channels_last)
    view = rand((1, 5, 5, 8))[:, 2:4, 1:3, :2]
    for training in (False, True):
        args = (*rest[:8], *([None] * 4 if training else rest[8:]))
        registers(op.fwd, (x.clone().requires_grad_(), *args, training, 1e-5), full)
        for t in (last, view):
            registers(op.fwd, (t, *args, training, 1e-5), full)
        for t, dy in ((x, last), (last, x)):
            _, *kept, _ = op.fwd(t, *args, training, 1e-5)
            registers(op.bwd, (dy, t, *args, *kept, training, 1e-5), full)


@pytest.mark.parametrize("f", [plain, reference.subspace_gate], ids=["eager", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training, f):
    x, *rest = inputs((2, 4, 2, 3, 2), torch.float64)
    parameters, running = rest[:8], rest[8:]
    gradients_are_right(lambda *t: with_statistics(f, training)(*t, *running), x, *parameters, twice=False)


@pytest.mark.parametrize("training", [False, True])
def test_second_derivative(training):
    x, *rest = inputs((1, 2, 2, 2, 1), torch.float64)
    parameters, running = rest[:8], rest[8:]
    gradients_are_right(lambda *t: with_statistics(plain, training)(*t, *running), x, *parameters)


def test_second_derivative_is_refused_on_triton():
    refuses_second_derivative(triton, *inputs(SHAPES[0]))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, *tensors = inputs(SHAPES[0])
        for name, t in zip(NAMES[1:9], tensors):
            setattr(self, name, torch.nn.Parameter(t))
        for name, t in zip(NAMES[9:], tensors[8:]):
            self.register_buffer(name, t.clone())

    def forward(self, x):
        return subspace_gate(x, *(getattr(self, name) for name in NAMES[1:]), self.training)


@pytest.mark.parametrize("training", [False, True])
@COMPILED
def test_compiles_in_one_graph(name, dynamic, training):
    ours, exact = (Module().to(DEVICE).train(training) for _ in range(2))
    x = rand(SHAPES[0][:4])
    torch.compiler.reset()
    with backend(name):
        compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for got, expected in zip(evaluate(compiled, (x,)), evaluate(exact, (x,)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # in training gradients cancel
        if dynamic:
            assert_close(compiled(x[:1]), exact(x[:1]))
    for got, expected in zip(ours.buffers(), exact.buffers()):
        assert_close(got, expected)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    model, x, y = Module().to(DEVICE).eval(), rand((2, 12, 5, 7)), rand((3, 12, 5, 7), seed=1)
    with backend(name):
        program = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim("batch")}])
        assert_close(program.module()(y), model(y))
        called = any("subspace_gate_fwd" in str(node.target) for node in program.graph.nodes)
        assert called == (name == "triton")


@pytest.mark.parametrize("training", [False, True])
def test_scripts(training):
    args = inputs(SHAPES[0])
    copies = [t.clone() for t in args]
    assert_close(torch.jit.script(subspace_gate)(*args, training), plain(*copies, training))
    for ours, exact in zip(args, copies):
        assert_close(ours, exact)


def test_meta_tensors_have_shapes():
    args = [t.to("meta") for t in inputs(SHAPES[0])]
    for training in (False, True):
        assert subspace_gate(*args, training).shape == args[0].shape


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_autocast_changes_nothing(f):
    for dtype in (torch.float32, torch.float16):
        x, *rest = inputs(SHAPES[0])
        parameters, running = rest[:8], rest[8:]
        autocast_changes_nothing(lambda *t, running=running: f(*t, *running), x.to(dtype), *parameters)


def test_flops_are_those_of_the_convolutions():
    x, *rest = inputs(SHAPES[0])
    forward, backward = flops(lambda x: triton(x, *rest), x)
    assert forward == 2 * 2 * x.numel()
    assert backward == 2 * forward


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_are_no_larger_than_chosen(channels_last):
    for name, (elements, _) in kernel.TILES.items():
        for G, P in [(1, 1), (6, 196), (128, 196), (512, 3136), (3, 49)]:
            t = kernel.tile(name, G, P, channels_last)
            assert t["BLOCK_C"] * t["BLOCK_P"] <= elements
