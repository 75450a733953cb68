"""Every recipe is the published one, or its header says how it differs: tests/support/published has the values."""

import pytest
from support import recipes
from support.published import ade20k, coco, imagenet, nuscenes

TABLES = dict(imagenet=imagenet.TABLE, coco=coco.TABLE, ade20k=ade20k.TABLE, nuscenes=nuscenes.TABLE)
# Configs in whose names these patterns match the same text have models alike: make test builds one of them.
GROUPS = dict(
    imagenet=r"(agent_[a-z]+|halo_h|[a-z]+)",
    coco=r"[a-z_]+?_(agent_pvt|agent_swin|biformer|davit|dinats|dinat|ela|nat|patnet)",
    ade20k=r"[a-z]+_(agent_pvt|agent_swin|biformer|davit|dinats|dinat|folders|nat)",
    nuscenes=r"dfa.d_bev_._?[a-z]*",
)


@pytest.mark.parametrize("name", [name for folder in TABLES for name in recipes.names(folder)])
def test_recipe_is_the_published_one(name):
    recipes.compare(name, TABLES[name.partition("/")[0]])


@pytest.mark.parametrize(
    "name", [name for folder in TABLES for name in recipes.built(folder, TABLES[folder], GROUPS[folder])]
)
def test_model(name):
    recipes.compare_model(name, TABLES[name.partition("/")[0]])
