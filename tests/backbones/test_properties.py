"""Properties of models: images are independent, runs agree, copies are equal. Small ones of every family, and all."""

import copy
import io
import pickle

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.budget import assert_close
from support.families import SMALL, build, images
from torch import nn

OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("saccade.")]
STEADY = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def results(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(*inputs)
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="module")
def models():
    """models(name) -> the small model of a family, built once."""
    built: dict[str, nn.Module] = {}

    def call(name: str) -> nn.Module:
        if name not in built:
            built[name] = build(name).eval()
        return built[name]

    return call


def batch_of(inputs: tuple, rows: list[int]) -> tuple:
    return tuple(x[rows] for x in inputs)


@pytest.mark.parametrize("name", SMALL)
def test_images_are_independent(models, name):
    """An image alone, in a batch, in another order, beside others and beside itself gives the same."""
    model, inputs = models(name), images(name, batch=4, seed=3)
    alone = [results(model, batch_of(inputs, [i])) for i in range(4)]

    @settings(max_examples=2, **STEADY)
    @given(st.lists(st.integers(0, 3), min_size=2, max_size=5))
    def run(rows):
        for position, values in enumerate(zip(*(out for out in results(model, batch_of(inputs, rows))), strict=False)):
            assert_close(list(values), [x[0] for x in alone[rows[position]]])

    run()


@pytest.mark.parametrize("name", SMALL)
def test_two_runs_agree(models, name):
    inputs = images(name, batch=2)
    for ours, again in zip(results(models(name), inputs), results(models(name), inputs), strict=True):
        assert torch.equal(ours, again) and ours.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_copies(models, name):
    """The state_dict through a file, deepcopy and pickle: the same outputs, to the bit."""
    model, inputs = models(name), images(name, batch=1)
    expected = results(model, inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = build(name).eval()
    for parameter in loaded.parameters():
        parameter.data.fill_(0.5)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, again in zip(expected, results(other, inputs), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("name", SMALL)
def test_no_images(models, name):
    """An empty batch, such as a process without images has."""
    inputs = images(name, batch=1)
    for none, one in zip(results(models(name), batch_of(inputs, [])), results(models(name), inputs), strict=True):
        assert none.shape == (0, *one.shape[1:])


@pytest.mark.parametrize("name", [*SMALL, "depth groups"])
def test_built_on_the_meta_device(name):
    """A state_dict then holds all that the model computes with: nothing is left without values."""
    if name == "depth groups":
        name, kwargs = "dfa3d_bev_s", dict(depth_bound=(2.0, 14.0, 1.0), depth_groups=(1, 2, 3))
    else:
        kwargs = {}
    with torch.device("meta"):
        model = build(name, **kwargs)
    assert {key for key, _ in model.named_buffers()} <= model.state_dict().keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in OURS if "bev" not in name])
def test_every_model(name):
    """Every registered classifier as it is: independent of its neighbours, equal runs and copies."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        both, one, again = model(x), model(x[1:]), copy.deepcopy(model)(x)
    assert torch.equal(both, again) and both.isfinite().all()
    assert_close(both[1:], one)
