"""What holds for all models: features that are not there, and names."""

import subprocess
import sys

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm


@pytest.mark.parametrize(("name", "maps"), [("davit_t", 4), ("halo_h0", 5), ("agent_pvt_t", 4), ("agent_deit_t", 12)])
def test_features_that_are_not_there_are_refused_in_one_sentence(name, maps):
    with pytest.raises(AssertionError, match=rf"feature index {maps} is out of range \(0 to {maps - 1}\)"):
        timm.create_model(name, features_only=True, out_indices=(0, maps))
    model = timm.create_model(name, device="meta")
    with pytest.raises(ValueError, match=r"output_fmt must be 'NCHW'.* got 'NHWC'"):
        model.forward_intermediates(None, output_fmt="NHWC")


def test_timms_names_stay_timms():
    """Models are registered under names of their own, without a warning; timm's and their weights stay as they were."""
    code = (
        "import warnings, timm; warnings.simplefilter('error');"
        "before = {name: timm.model_entrypoint(name) for name in timm.list_models()}; weights = timm.list_pretrained();"
        "import saccade.backbones;"
        "assert all(timm.model_entrypoint(name) is function for name, function in before.items());"
        "assert set(timm.list_pretrained()) >= set(weights) and len(timm.list_models()) > len(before)"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_macs_of_an_operators_first_call():
    """Kernels register the formula that counts them when they are first called, which is after the counter began."""
    code = (
        "import torch; from saccade.ops import backend, window_attention; from saccade.train.runtime import measure;"
        "from torch._subclasses import FakeTensorMode;"
        "model = torch.nn.Identity(); model.forward = lambda x: window_attention(x, 2, (2, 2));"
        "mode = FakeTensorMode(); mode.__enter__(); x = torch.empty(1, 4, 4, 3, 16, device='cuda');"
        "print(measure.macs(model, x), measure.macs(model, x))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(2 * 16 * 4 * 16)] * 2, done.stderr  # q kᵀ and p v: 16 queries, 4 keys, C = 16
