"""What the models' pretrained configurations say of weights and licenses is so, and says where to find a file."""

import re

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
from saccade.backbones import nat

OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("saccade.")]
HUB = dict(
    davit_t="timm/davit_tiny.msft_in1k",
    davit_s="timm/davit_small.msft_in1k",
    davit_b="timm/davit_base.msft_in1k",
    halo_26t="timm/halonet26t.a1h_in1k",
    halo_50ts="timm/halonet50ts.a1h_in1k",
    halo_se33ts="timm/sehalonet33ts.ra2_in1k",
    halo_eca26ts="timm/eca_halonext26ts.c1_in1k",
    halo_regnetz_b="timm/haloregnetz_b.ra3_in1k",
)


def test_tags_say_whether_there_are_weights():
    for name in timm.list_models():
        for tagged in timm.list_models(f"{name}.*", include_tags=True) if name in OURS else ():
            cfg = timm.get_pretrained_cfg(tagged)
            assert bool(cfg.has_weights) != cfg.tag.startswith("untrained"), tagged
    assert {name: timm.get_pretrained_cfg(name).hf_hub_id for name in HUB} == HUB
    sites = set(nat.VARIANTS)  # the addresses in the authors' code
    assert all(timm.get_pretrained_cfg(name).url for name in sites)
    assert {name for name in OURS if timm.get_pretrained_cfg(name).has_weights} == set(HUB) | sites


@pytest.mark.parametrize("name", HUB)
def test_hub_weights_have_timms_configuration(name):
    """Preprocessing and license are those of timm's model of the same weights."""
    ours, theirs = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(HUB[name].removeprefix("timm/"))
    for entry in ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "license"):
        assert getattr(ours, entry) == getattr(theirs, entry), entry


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("agent_swin_t", None),
        ("biformer_t", "mit"),
        ("davit_l", "mit"),
        ("davit_h", None),
        ("dfa3d_bev_s", "IDEA License 1.0, non-commercial"),
        ("ela_mobilenetv2", "apache-2.0"),
        ("ela_resnet50", None),
        ("halo_h1", None),
        ("nat_m", "mit"),
        ("patnet_t0", "mit"),
        ("sparsifiner_deit_s", "mit"),
        ("ulsam_mobilenet_v2", None),
    ],
)
def test_licenses(name, license):
    assert timm.get_pretrained_cfg(name).license == license


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("agent_pvt_t", "share links in the authors' README: https://github.com/LeapLabTHU/Agent-Attention"),
        ("biformer_t", "share links in the authors' README, which users report dead: https://github.com/rayleizhu"),
        ("davit_g", "none are published"),
        ("dfa3d_bev_s", "bevformer_small_DFA3D by the authors' links: https://github.com/IDEA-Research"),
        ("ela_resnet18", "none are published"),
        ("halo_h0", "none are published"),
        ("patnet_t0", "share links in issues 3 and 4, which expire: https://github.com/haiduo/PartialNet"),
        ("patnet_s", "none are published"),
        ("sparsifiner_lvvit_s", "none are published, but those of its dense parent"),
        ("ulsam_mobilenet_v2", "none are published"),
    ],
)
def test_weights_that_cannot_be_downloaded(name, where):
    sentence = rf"^{name} has no weights to download \({re.escape(where)}.*pretrained_cfg_overlay=dict\(file=PATH\)"
    with pytest.raises(RuntimeError, match=sentence):
        timm.create_model(name, pretrained=True)
