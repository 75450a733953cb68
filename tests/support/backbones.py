"""Tests that the families of backbones share. A family's test file is a subclass with its cases, and its own tests."""

import copy
import itertools

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.train.runtime import measure
from torch import Tensor, nn

from . import parity
from .gradients import assert_gradients
from .graphs import compiles_and_exports
from .levels import exhaustive


def named(name: str, case):
    """Return the case of a table under its name."""
    case = case if hasattr(case, "marks") else pytest.param(case)
    return pytest.param(*case.values, marks=case.marks, id=name)


class Backbone:
    """The contract. A test that a family cannot take or has in another form is None there, with the reason.

    A case may be a pytest.param with a mark, as `exhaustive` returns it.
    """

    FIXTURES = ""  # the folder of its golden fixtures
    NAME = ""  # the model that the small ones are made of
    SMALL = {}  # their arguments: every kind of layer, small enough to run anywhere
    FORMS = {"small": {}}  # name: arguments of the small models that the tests go through
    WHOLE = DENSE = ()  # (fixture, model, arguments) of classifiers, and of backbones for dense tasks
    COUNTS = {}  # parameters of each registered model
    MACS = {}  # multiply-accumulates at the default size in 10**9; one runs in make test
    MACS_RTOL = 0.005
    STRIDES = (4, 8, 16, 32)  # of the maps
    SIZES = ((32, 32), (33, 70), (97, 45))
    SIZED = {}  # forms for those sizes, where they are not FORMS
    CHANNELS_LAST = False  # whether maps have that memory format
    FILES = {"small": {}}  # forms of files: with every parameter that one can have
    CONTAINERS = ("model", "state_dict", None)
    PREFIXES = ("", "module.", "backbone.")
    ALIENS = {}  # name: (arguments of a small model, or another model's name, and the sentence)
    IMPOSSIBLE = ()  # (arguments, sentence)
    BLOCKS = 0  # of the small model, if it is one
    CHECKPOINT_MODE = True  # training
    CHECKPOINT_RTOL = 0.0
    ROUNDING = 0.05  # of a model in bfloat16, relative
    ROUNDED_SIZE = (64, 64)
    LEARNING = dict(drop_path_rate=0.1)
    IMAGES, STEPS, RATE, FALL = (16, 3, 32, 32), 15, 2e-3, 0.6  # the loss falls to this part of the first
    BACKENDS = ("aot_eager", exhaustive("inductor"))
    COMPILED = {"small": {}}  # forms
    COMPILED_SIZE = (64, 64)

    def pytest_generate_tests(self, metafunc):
        """Parametrize the contract's tests by the tables above."""
        published = ("fixture", "name", "arguments")
        pairs = itertools.product(self.CONTAINERS, self.PREFIXES)  # in make test each container and each prefix once
        files = [pair if pair[0] == self.CONTAINERS[0] or not pair[1] else exhaustive(*pair) for pair in pairs]
        tables = dict(
            test_equals_published_model={published: self.WHOLE},
            test_equals_published_dense_backbone={published: self.DENSE},
            test_parameter_counts={("name", "count"): self.COUNTS.items()},
            test_macs={
                ("name", "giga"): [exhaustive(*case) if i else case for i, case in enumerate(self.MACS.items())]
            },
            test_any_size={"form": self.SIZED or self.FORMS, "size": {str(size): size for size in self.SIZES}},
            test_published_containers={"form": self.FILES, ("container", "prefix"): files},
            test_other_weights_are_refused_in_one_sentence={"alien": self.ALIENS},
            test_impossible_models_are_refused_in_one_sentence={("arguments", "sentence"): self.IMPOSSIBLE},
            test_compiles_and_exports={"form": self.COMPILED, "backend": self.BACKENDS},
        )
        default = {"form": self.FORMS} if "form" in metafunc.fixturenames else {}
        for names, cases in tables.get(metafunc.function.__name__, default).items():
            if isinstance(cases, dict):
                cases = [named(name, case) for name, case in cases.items()]
            metafunc.parametrize(names, list(cases))

    # What a family gives.

    def small(self, **kwargs) -> nn.Module:
        """Return a small model with the same values each time."""
        raise NotImplementedError

    def initial(self, **kwargs) -> nn.Module:
        """Return a small model as it begins its training."""
        return self.small(**kwargs)

    def options(self, **kwargs) -> dict:
        """Return the name and the arguments of a small model."""
        return dict(name=self.NAME) | self.SMALL | kwargs

    def rename(self, key: str) -> str:
        """Return our name of a published parameter."""
        return key

    def published(self, key: str) -> str:
        """Return the published name of a small model's parameter."""
        return key

    def file(self, weights: dict) -> dict:
        """Return what the file of a published classifier holds."""
        return {"state_dict": weights}

    def outputs(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Return what fixtures record of a classifier, the logits last."""
        last, stages = model.forward_intermediates(x)
        maps = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        return maps | {"logits": model.forward_head(last)}

    def check_gradients(self, model: nn.Module, want: dict) -> None:
        parity.assert_gradients(model, want["grads"], self.rename)

    def same(self, model: nn.Module) -> list[nn.Module]:
        """Return the model in evaluation mode, and other forms of it that compute the same."""
        return [model]

    # Parity with the published models.

    def load(self, tmp_path, content: dict, **kwargs) -> nn.Module:
        """Return a small model whose weights come from a file with that content."""
        return parity.load_file(tmp_path, content, **self.options(**kwargs))

    def check_published(self, model: nn.Module, want: dict, outputs) -> None:
        """Check everything that the fixture records: outputs, their number of parameters and the gradients.

        outputs: function of the model and the image; of the last one the gradients are taken.
        """
        x, expected = parity.image(want), want["outputs"]
        ours = outputs(model, x)
        for key in expected:
            parity.assert_equal(key, ours[key], expected[key])
        assert sum(p.numel() for p in model.parameters()) == want["params"]
        y = list(ours.values())[-1]
        (y * parity.seeded(1, y.shape)).sum().backward()
        self.check_gradients(getattr(model, "model", model), want)
        for other in self.same(model)[1:]:
            with torch.no_grad():
                ours = outputs(other, x)
            for key in expected:
                parity.assert_equal(key, ours[key], expected[key])

    def test_equals_published_model(self, tmp_path, fixture, name, arguments):
        want = parity.load(self.FIXTURES, fixture)
        model = parity.load_file(tmp_path, self.file(parity.weights(want)), name, **arguments)
        self.check_published(model, want, self.outputs)

    def test_parameter_counts(self, name, count):
        """Those counted on the published models."""
        model = timm.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count

    def macs(self, model: nn.Module) -> float:
        x = torch.empty(1, *model.default_cfg["input_size"], device="meta", dtype=torch.float32)
        return measure.macs(model, x)

    def test_macs(self, name, giga):
        """Those of the published models at the default size."""
        model = timm.create_model(name, device="meta", dtype=torch.float32)
        assert self.macs(model) / 1e9 == pytest.approx(giga, rel=self.MACS_RTOL)

    # Files.

    def test_published_containers(self, tmp_path, form, container, prefix):
        """Weights lie under 'model' or 'state_dict', or bare; parallel runs prefix 'module.', detectors 'backbone.'."""
        state = self.small(**form).state_dict()
        assert {self.rename(self.published(key)) for key in state} == set(state)
        weights = {prefix + self.published(k): torch.rand(v.shape).to(v.dtype) for k, v in state.items()}
        file = dict(weights)
        if prefix == "backbone.":
            file["decode_head.conv_seg.weight"] = torch.zeros(3)
        model = self.load(tmp_path, {container: file, "epoch": 3} if container else file, **form)
        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[prefix + self.published(key)]), key

    def test_other_weights_are_refused_in_one_sentence(self, tmp_path, alien):
        """A case may end with arguments of the model that refuses."""
        source, sentence, *form = alien
        other = timm.create_model(source, device="cpu") if isinstance(source, str) else self.small(**source)
        ours = type(self.small(**dict(*form))).__name__
        with pytest.raises(ValueError, match=f"not the weights of this {ours}: .*{sentence}") as caught:
            self.load(tmp_path, other.state_dict(), **dict(*form))
        assert "\n" not in str(caught.value)

    def test_impossible_models_are_refused_in_one_sentence(self, arguments, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            self.small(**arguments)
        assert "\n" not in str(caught.value)

    def test_unknown_arguments_are_refused(self, form):
        with pytest.raises(TypeError, match="misspelt"):
            self.small(**form, misspelt=4)

    # A timm backbone.

    def side(self, n: int, stride: int, **form) -> int:
        """Return the side of a map."""
        return -(-n // stride)

    def test_any_size(self, form, size):
        model = self.small(features_only=True, **form).eval()
        maps = model(torch.randn(2, 3, *size))
        assert len(maps) == len(self.STRIDES) and model.feature_info.reduction() == list(self.STRIDES)
        for m, stride in zip(maps, self.STRIDES):
            assert m.shape[2:] == tuple(self.side(n, stride, **form) for n in size)
            assert m.isfinite().all()
            assert not self.CHANNELS_LAST or m.is_contiguous(memory_format=torch.channels_last)

    def test_images_do_not_see_each_other(self, form):
        model, x = self.small(**form).eval(), torch.randn(3, 3, 75, 90)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)

    def test_forward_is_features_and_head(self, form):
        model, x = self.small(**form).eval(), torch.randn(2, 3, 64, 64)
        y = model(x)
        for features in (model.forward_features(x), model.forward_intermediates(x)[0]):
            assert torch.equal(model.forward_head(features), y)

    def test_drop_path_grows_from_block_to_block(self, form):
        """One rate for each block, as published."""
        rates = []
        for m in self.small(**form, drop_path_rate=0.9).modules():
            drop = getattr(m, "drop_path", getattr(m, "drop_path1", None))
            rates += [getattr(drop, "drop_prob", 0.0)] * (drop is not None)
        assert len(rates) == (self.BLOCKS or len(rates)) > 2
        torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.9, len(rates)), rtol=0, atol=1e-7)

    def test_gradient_checkpointing_changes_nothing(self, form):
        x, results = torch.randn(2, 3, 64, 64), []
        for enable in (False, True):
            model = self.small(**form).train(self.CHECKPOINT_MODE)
            model.set_grad_checkpointing(enable)
            torch.manual_seed(1)  # dropout draws the same again
            y = model(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 1
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=self.CHECKPOINT_RTOL, atol=self.CHECKPOINT_RTOL)

    def test_bfloat16_autocast_is_close(self, form):
        torch.set_default_dtype(torch.float32)
        model, x = self.small(**form).eval(), torch.randn(2, 3, *self.ROUNDED_SIZE)
        exact = copy.deepcopy(model).double()(x.double())
        for each in self.same(model):
            with torch.autocast("cpu", torch.bfloat16):
                low = each(x)
            assert low.dtype == torch.bfloat16
            assert (low.double() - exact).norm() / exact.norm() < self.ROUNDING

    def test_on_the_meta_device(self, form):
        model = self.small(**form, device="meta", dtype=torch.bfloat16)
        assert model(torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)).shape == (2, 7)

    def train(self, model: nn.Module) -> list[float]:
        """Return the losses of a few steps."""
        x, target = torch.randn(*self.IMAGES), torch.arange(self.IMAGES[0]) % 7
        optimizer, losses = torch.optim.AdamW(model.parameters(), self.RATE), []
        for _ in range(self.STEPS):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def test_loss_falls(self, form):
        torch.set_default_dtype(torch.float32)
        losses = self.train(self.initial(**form, **self.LEARNING))
        assert losses[-1] < self.FALL * losses[0]

    def test_compiles_and_exports(self, form, backend):
        torch.set_default_dtype(torch.float32)
        compiles_and_exports(self.small(**form), self.COMPILED_SIZE, backend)


class Pyramid(Backbone):
    """A family whose backbones for dense tasks are published, too, with norms behind the stages."""

    FILES = {"dense": dict(out_norms=True)}
    MAPS = ()  # the fixtures' names of the maps, then of all of them in one, if recorded
    NORMED = {}  # arguments of the small model with norms
    EPS = 1e-5  # of those norms; None: they are BatchNorms

    def dense_outputs(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        maps = model(x)
        return dict(zip(self.MAPS, (*maps, torch.cat([m.flatten(1) for m in maps], 1))))

    def test_equals_published_dense_backbone(self, tmp_path, fixture, name, arguments):
        want = parity.load(self.FIXTURES, fixture)
        weights = {"state_dict": parity.weights(want)}
        model = parity.load_file(tmp_path, weights, name, features_only=True, **arguments)
        self.check_published(model, want, self.dense_outputs)

    def test_files_of_one_task_load_into_models_of_the_other(self, tmp_path):
        """What a file lacks, head or norms, keeps its initial values; what it has beyond is dropped."""
        first = next(iter(self.small(**self.NORMED).state_dict()))
        dense = self.small(**self.NORMED, out_norms=True)
        state = {
            self.published(k): v + 1 for k, v in dense.state_dict().items() if not k.startswith(("head.", "norm."))
        }
        classifier = self.load(tmp_path, {"model": state}, **self.NORMED)
        assert torch.equal(classifier.state_dict()[first], state[self.published(first)])
        weights = [p for p in classifier.head.parameters() if p.ndim > 1]
        assert weights and all(p.std() > 0.01 for p in weights)
        plain = {self.published(k): v + 1 for k, v in self.small(**self.NORMED).state_dict().items()}
        features = self.load(tmp_path, {"state_dict": plain}, **self.NORMED, out_norms=True, features_only=True).model
        assert torch.equal(features.state_dict()[first], plain[self.published(first)])
        norms = [p for key, p in features.out_norms.named_parameters() if key.endswith("weight")]
        assert len(norms) == 4 and all(torch.equal(p, torch.ones_like(p)) for p in norms)

    def test_out_norms_do_not_reach_the_next_stage(self):
        x = torch.randn(1, 3, 64, 64)
        plain, normed = (self.small(**self.NORMED, out_norms=norms).eval() for norms in (False, True))
        normed.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(plain(x), normed(x))
        maps = (m.forward_intermediates(x, intermediates_only=True) for m in (plain, normed))
        for raw, out, norm in zip(*maps, normed.out_norms):
            if self.EPS is None:
                torch.testing.assert_close(out, norm(raw))
            else:
                centred = raw - raw.mean(1, keepdim=True)
                torch.testing.assert_close(out, centred / (centred.square().mean(1, keepdim=True) + self.EPS).sqrt())

    def test_pruned_model_keeps_the_norms_of_its_maps(self):
        x, model = torch.randn(1, 3, 64, 64), self.small(**self.NORMED, out_norms=True).eval()
        want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        got = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(want, got))
        assert len(model.stages) == 3 and len(list(model.out_norms.parameters())) == 4


class InNetworksOfOthers(Backbone):
    """A layer in networks of timm's: their keys, maps and classifiers, and BatchNorms."""

    STRIDES = (2, 4, 8, 16, 32)
    CHECKPOINT_MODE, CHECKPOINT_RTOL = False, 1e-12  # in training a BatchNorm would count a batch twice
    BACKENDS = ("aot_eager",)
    HEAD_BIAS = 0.0  # the largest initial one of a classifier
    test_published_containers = None  # the published code has the layer alone
    test_drop_path_grows_from_block_to_block = None  # it is timm's

    def outputs(self, model, x):
        last, maps = model.forward_intermediates(x)
        stages = {f"stage{i}": stage for i, stage in enumerate(maps)}
        return stages | {"features": last, "logits": model.forward_head(last)}

    def check_gradients(self, model, want):
        assert_gradients(model, want, lambda state: self.checkpoint_filter_fn(state, model))

    def test_own_weights_load(self, tmp_path, form):
        """Also a file's that has no classifier, which stays what it was."""
        state = self.small(**form).state_dict()
        state = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
        model = self.load(tmp_path, {"model": state}, **form)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        head, first = model.pretrained_cfg["classifier"], next(iter(state))
        body = {f"backbone.{key}": value for key, value in state.items() if not key.startswith(head)}
        model = self.load(tmp_path, body, **form)
        assert torch.equal(model.state_dict()[first], state[first])
        assert (model.get_classifier().bias.abs() <= self.HEAD_BIAS).all()
