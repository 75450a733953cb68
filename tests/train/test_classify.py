"""The classifier's criterion."""

from types import SimpleNamespace

import pytest
import torch
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.classify import Classify
from torch.nn.functional import binary_cross_entropy_with_logits

DATA = SimpleNamespace(class_names=["a", "b", "c"], img_size=None)


@pytest.mark.parametrize("threshold, wanted", [(None, [0.7, 0.3, 0.0]), (0.2, [1.0, 1.0, 0.0]), (0.5, [1.0, 0.0, 0.0])])
def test_bce_of_mixed_images(threshold, wanted):
    """Above the threshold both classes of a mixed image are right, as in ResNet Strikes Back."""
    criterion = Classify(DATA, mixup=0.2, bce=True, bce_threshold=threshold).criterion
    logits = torch.tensor([[0.5, -1.0, 2.0]])
    loss = criterion(logits, torch.tensor([[0.7, 0.3, 0.0]]))
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, torch.tensor([wanted])))


@pytest.mark.parametrize("arguments", [dict(bce_threshold=0.2), dict(bce=True, bce_threshold=1.0)])
def test_bce_threshold_needs_bce(arguments):
    with pytest.raises(UserError, match=r"task.bce_threshold=.* must be in \[0, 1\) and needs task.bce=True"):
        Classify(DATA, **arguments)
