"""What makes a model on several devices compute: each part takes its input to its own device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwenkit.layers.linear import Embedding
from qwenkit.models.spec import CausalModel
from qwenkit.parallel.device_map import DeviceMap, Parts


def model_parts(model: CausalModel) -> Parts:
    """The parts of a model of any architecture, found by what they are."""
    layers = model.config.num_hidden_layers
    paths = {module: path for path, module in model.named_modules()}
    embedding = next(m for m in paths if isinstance(m, Embedding))
    blocks = next(m for m in paths if isinstance(m, nn.ModuleList) and len(m) == layers)
    body = paths[blocks].rpartition(".")[0]
    norm = next(
        name
        for name, child in model.get_submodule(body).named_children()
        if child not in (embedding, blocks)
    )
    return Parts(
        embedding=paths[embedding],
        blocks=tuple(f"{paths[blocks]}.{number}" for number in range(layers)),
        norm=f"{body}.{norm}" if body else norm,
        head="lm_head",
        tied=model.config.tie_word_embeddings,
    )


def connect(model: CausalModel, devices: DeviceMap) -> None:
    """Let every part whose predecessor is elsewhere fetch what it is given, in place.

    The context of a forward pass must serve each device: `layers/attention.py: ByDevice`.
    """
    before = None
    for path in devices.parts.paths:
        device = devices.devices[path]
        if device != before:
            model.get_submodule(path).register_forward_pre_hook(_Fetch(device))
        before = device


class _Fetch:
    """A hook before a module's forward: its first argument, a tensor, on `device`."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].to(self._device), *arguments[1:])
