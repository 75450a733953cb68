"""Top-k counts against the plain definition."""

import pytest
import torch
from saccade.train.errors import UserError
from saccade.train.metrics.topk import TopK

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_counts(classes):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(101, classes, generator=g), torch.randint(classes, (101,), generator=g)
    counts = TopK(classes, CPU)
    for part in (slice(0, 64), slice(64, 101)):
        counts.update(logits[part], labels[part])
    metrics, confusion = counts.result()
    order = logits.argsort(1, descending=True)
    assert metrics["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert metrics["images"] == 101 == confusion.sum()
    for true in range(classes):
        for said in range(classes):
            assert confusion[true, said] == ((labels == true) & (order[:, 0] == said)).sum()


def test_not_finite():
    counts = TopK(3, CPU)
    counts.update(torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="outputs are not finite"):
        counts.result()
