"""Mixed precision: convolutions whose kernel outgrows its feature map."""

import itertools

import pytest
import torch
from saccade.train.runtime.precision import CONVOLUTIONS, _outgrows, autocasting

CPU = torch.device("cpu")


def test_outgrown_kernels():
    """A kernel outgrows its map exactly where an element of it has no gradient, whatever the input."""
    for n, k, s, p, d in itertools.product(range(1, 6), (1, 3, 5, 7), (1, 2, 3, 4), (0, 1, 2, 3, "same"), (1, 2)):
        if (p == "same" and s > 1) or (p != "same" and n + 2 * p < d * (k - 1) + 1):
            continue
        x, w = torch.ones(1, 1, n, dtype=torch.float32), torch.ones(1, 1, k, requires_grad=True)
        (grad,) = torch.autograd.grad(torch.conv1d(x, w, None, s, p, d).sum(), w)
        assert _outgrows(1, x, w, None, s, p, d) == bool((grad == 0).any()), (n, k, s, p, d)
    x, w = torch.ones(1, 1, 4, 1), torch.ones(1, 1, 3, 3)
    assert _outgrows(2, x, w, padding=(1, 1)) and not _outgrows(2, x, w[..., :1], padding=(1, 0))
    assert not _outgrows(2, x.double(), w.double(), padding=1)


@pytest.mark.parametrize(
    "sizes, kernel, stride, padding",
    [((1,), 3, 2, 1), ((1, 1), 3, 2, 1), ((8, 1), 3, 2, 1), ((1, 8), 5, 1, 2), ((2, 2), 5, 4, 2), ((1, 1, 1), 3, 2, 1)],
    ids=str,
)
def test_gradients_in_bf16(sizes, kernel, stride, padding):
    """A kernel's elements that meet padding only get gradients of 0, not what the memory held before."""
    conv = {axes: conv for conv, axes in CONVOLUTIONS.items()}[len(sizes)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, *sizes, generator=generator)
    w = torch.randn(64, 64, *[kernel] * len(sizes), generator=generator, requires_grad=True)
    with autocasting(CPU, "bf16")():
        y = conv(x, w, None, stride, padding)
    assert y.dtype == torch.bfloat16
    freed = [torch.full_like(w, float("nan")) for _ in range(8)]  # the memory that comes next
    del freed
    (grad,) = torch.autograd.grad(y.float().square().sum() / 2, w)
    dy = conv(x, w, None, stride, padding).bfloat16().float()
    (expected,) = torch.autograd.grad((conv(x, w, None, stride, padding) * dy.detach()).sum(), w)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    assert (grad == 0).any()
