import torch
from saccade.backbones.layers import CachedMlp, _tokens_at_once, resize_positions


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
