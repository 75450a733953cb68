import pytest
import torch
from saccade.backbones.layers import CachedMlp, DepthwiseConv, _tokens_at_once, channels_last, resize_positions


def test_few_tokens_at_once_are_as_good_as_all():
    mlp, x = CachedMlp(8, 512, dtype=torch.float64), torch.randn(3, 1000, 8, dtype=torch.float64)
    with torch.no_grad():
        assert _tokens_at_once(x, 512) == 0  # 12 MB fit
        x = torch.cat((x, x), 1)
        assert _tokens_at_once(x, 512) == 1024
        few = mlp(x)
    assert _tokens_at_once(x, 512) == 0  # with gradients all at once
    torch.testing.assert_close(few, mlp(x), rtol=1e-12, atol=1e-12)
    map_ = x.unflatten(1, (40, 50))
    with torch.no_grad():
        assert torch.equal(mlp(map_), few.unflatten(1, (40, 50)))


def test_positions_of_another_size():
    table = torch.randn(1, 1 + 3 * 5, 4)
    assert resize_positions(table, (3, 5), (3, 5), "bicubic") is table
    ramp = torch.arange(5.0).expand(3, 5)
    table = torch.cat((torch.full((1, 1), -7.0), ramp.reshape(1, 15)), 1)[..., None]
    out = resize_positions(table, (3, 5), (6, 10), "bilinear")
    assert out.shape == (1, 61, 1) and out[0, 0, 0] == -7  # the class token's stays
    expected = ((torch.arange(10) + 0.5) / 2 - 0.5).clamp(0, 4)  # pixel centres, clamped at the border
    torch.testing.assert_close(out[0, 1:, 0].view(6, 10), expected.expand(6, 10))


@pytest.mark.parametrize(("size", "kernel"), [((1, 1), 5), ((2, 3), 3), ((4, 4), 5), ((5, 4), 3), ((1, 9), 5)])
def test_depthwise_convolution_has_pytorchs_gradients(size, kernel):
    """On small maps, where they are computed otherwise, of first and second order, whichever are asked for."""
    torch.manual_seed(0)
    conv = DepthwiseConv(6, kernel, dtype=torch.float64)
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    out = conv(x)
    assert ("Depthwise" in type(out.grad_fn).__name__) == (size[0] * size[1] <= 16)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=kernel // 2, groups=6)
    dout = torch.randn_like(out)
    parameters = (x, conv.weight, conv.bias)
    ours, theirs = (torch.autograd.grad(y, parameters, dout, create_graph=True) for y in (out, plain))
    torch.testing.assert_close((out, *ours), (plain, *theirs), rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(sum(g.square().sum() for g in first), parameters[:2]) for first in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    conv.bias.requires_grad_(False)
    (alone,) = torch.autograd.grad(conv(x.detach()), conv.weight, dout)
    torch.testing.assert_close(alone, torch.autograd.grad(plain, conv.weight, dout)[0], rtol=1e-12, atol=1e-12)


def test_channels_last_under_transforms():
    """The format is that of ordinary calls, so that convolutions round alike."""
    x, strides = torch.randn(4, 2, 3, 5, 6), []

    def f(x):
        y = channels_last(x)
        strides.append(y.stride())
        return y.square().sum()

    assert torch.equal(torch.func.grad(f)(x[0]), 2 * x[0])
    assert torch.equal(torch.vmap(torch.func.grad(f))(x), 2 * x)
    assert set(strides) == {channels_last(x[0]).stride()} == {(90, 1, 18, 3)}
