"""Every published model's shape, built without memory, has as many parameters as its weights."""

from __future__ import annotations

import pytest
import torch

from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.moe import SparseMoe
from qwenkit.models.catalogue import PUBLISHED
from qwenkit.models.spec import CausalModel, find


def built(name: str) -> CausalModel:
    config = PUBLISHED[name].config
    architecture = find(config["model_type"])
    with torch.device("meta"):
        return architecture.build(architecture.config(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_shape(name: str) -> None:
    model = built(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name].parameters


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED.items() if p.active is not None])
def test_parameters_that_a_token_passes_through(name: str) -> None:
    model = built(name)
    active = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, SparseMoe):
            grouped = [m for m in module.experts.modules() if isinstance(m, GroupedLinear)]
            idle = grouped[0].groups - module.experts_per_token
            active -= idle * sum(m.in_features * m.out_features for m in grouped)
    assert active == PUBLISHED[name].active
