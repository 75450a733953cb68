"""timm's own model suite passes on our models; `make setup` fetches it, timm's source archive."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
from support.jobs import Job
from support.levels import exhaustive

SUITE = Path(sys.prefix) / "src" / f"timm-{version('timm')}"
# Small models of each kind of features; make test-all takes all, an hour.
SMALLEST = ["agent_pvt_t", "biformer_t", "ela_resnet18", "halo_26t", "patnet_t0", "sparsifiner_deit_t"]
SMALLEST += ["ulsam_mobilenet_v1_050"]
OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("saccade.")]
OURS = [name for name in OURS if not name.startswith("dfa3d")]  # a lifter takes cameras beside its images


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name if name in SMALLEST else exhaustive(name) for name in OURS])
def test_timms_own_suite(name):
    if not (SUITE / "tests" / "test_models.py").exists():
        pytest.skip(f"timm's source archive is not unpacked at {SUITE}: `make setup` fetches it")
    needed = 20 * sum(p.numel() for p in timm.create_model(name, device="meta").parameters())  # with gradients, copies
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"{name} needs about {needed / 2**30:.0f} GiB of memory here")
    job = Job(Path(__file__).parent / "support" / "timm_suite.py", SUITE, name)
    out = job.communicate(1100)[0]
    assert job.returncode == 0, out[-6000:]
    summary = out.strip().splitlines()[-1]
    # timm's suite has at least 9 tests for every model, 7 without those that want every gradient; fewer means that it
    # no longer finds the model.
    least = 7 if name.startswith("sparsifiner_") else 9
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= least and "skipped" not in summary, summary
