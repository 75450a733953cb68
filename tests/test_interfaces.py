"""Models of the zoo in the libraries that people use: each is tested where the library is installed."""

from pathlib import Path

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import torch
from support.families import SMALL, build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No library asks the Hub for anything, which may take minutes without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def library(name: str, minimum: str | None = None):
    return pytest.importorskip(name, minimum, reason=f"{name} is not installed", exc_type=ImportError)


def digits(count: int = 24):
    """Images (n, 3, 32, 32) of the classes 0 and 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits(n_class=2)
    images = torch.from_numpy(data.images[:count]).float()[:, None] / 8 - 1
    return nn.functional.interpolate(images.expand(-1, 3, -1, -1), 32), torch.from_numpy(data.target[:count])


def small(**kwargs) -> nn.Module:
    return build("biformer_t", num_classes=2, **kwargs)


@pytest.mark.parametrize("name", ["davit_t", "halo_h0"])
def test_torchvision_feature_extraction(name):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    leaves = dict(leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions()))
    model = build(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = create_feature_extractor(model, {"stages.1": "mid", "stages.3": "last"}, tracer_kwargs=leaves)(x)
        _, expected = model.forward_intermediates(x)
    maps = [one for one in expected if one.shape in (found["mid"].shape, found["last"].shape)]
    assert (
        any(torch.equal(found["last"], one) for one in maps) and found["mid"].shape[2] == 2 * 2 * found["last"].shape[2]
    )


def test_transformers_backbone():
    transformers = library("transformers")
    config = transformers.TimmBackboneConfig(backbone="biformer_t", out_indices=(1, 3))
    torch.manual_seed(0)
    backbone = transformers.AutoBackbone.from_config(config).eval()
    assert type(backbone).__name__ == "TimmBackbone"
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 128, 8, 8), (1, 512, 2, 2)] and backbone.channels == [128, 512]


def test_transformers_trainer(tmp_path):
    transformers = library("transformers")
    library("accelerate")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, pixel_values, labels):
            logits = self.model(pixel_values)
            return dict(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    data = [dict(pixel_values=image, labels=label) for image, label in zip(*digits())]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=3,
    )  # fmt: skip
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]


def test_accelerate():
    accelerate = library("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(*digits()), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_lightning(tmp_path):
    lightning = library("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = small(), []

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module()
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=8))
    assert len(module.losses) == 9 and sum(module.losses[-3:]) < 0.7 * sum(module.losses[:3])


def test_segmentation_models_pytorch():
    smp = library("segmentation_models_pytorch")
    model = smp.Unet("tu-biformer_t", encoder_weights=None, classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    names = {type(module).__module__ for module in model.encoder.modules()}
    assert "saccade.backbones.biformer" in names


def test_captum():
    attr = library("captum.attr")
    model = small().eval()
    x, y = digits(2)
    gradients = attr.IntegratedGradients(model).attribute(x, target=y, n_steps=8)
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    assert gradients.shape == x.shape
    torch.testing.assert_close(gradients.sum((1, 2, 3)), difference, rtol=0.1, atol=0.05)  # completeness


def test_grad_cam():
    cam = library("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = small().eval()
    x, _ = digits(1)
    with cam.GradCAM(model, [model.stages[2]]) as method:
        found = method(x, [ClassifierOutputTarget(1)])
    assert found.shape == (1, 32, 32) and found.min() >= 0 and found.max() <= 1 and found.std() > 0


def test_torch_hub():
    torch.manual_seed(0)
    model = torch.hub.load(str(ROOT), "biformer_t", source="local", num_classes=2, **SMALL["biformer_t"]).eval()
    assert torch.equal(model(torch.ones(1, 3, 32, 32)), small().eval()(torch.ones(1, 3, 32, 32)))


def test_every_interface_is_on_the_page():
    page = (ROOT / "docs/interfaces.md").read_text()
    names = (
        "AutoBackbone",
        "Trainer",
        "lightning",
        "accelerate",
        "tu-biformer_t",
        "create_feature_extractor",
        "captum",
    )
    assert not [name for name in (*names, "GradCAM", "torch.hub", "mmdet") if name not in page]
