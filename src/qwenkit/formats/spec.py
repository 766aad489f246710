"""What a storage format file offers, and how it is found.

Each module of this folder may end in a constant `FORMAT`. A checkpoint keeps a linear layer's
weight as one or several tensors ("weight"; "qweight", "scales", …); a format claims the sets of
tensors it can read and makes a `QuantWeight` of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

import qwenkit.formats
from qwenkit.layers.weight import QuantWeight

Claim = Callable[[Mapping[str, str], Mapping[str, Any]], bool]
Tag = Callable[[Mapping[str, str], Mapping[str, Any]], str]
Check = Callable[[QuantWeight, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A weight to test a format with: the numbers it was made of, and the root-mean-square error,
    relative to those numbers', that it may have.
    """

    weight: QuantWeight
    original: torch.Tensor
    relative_error: float


def _weight_tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    return storage["weight"]


def _agree(weight: QuantWeight, quantization_config: Mapping[str, Any]) -> None:
    return


@dataclass(frozen=True, slots=True)
class Format:
    """One storage format.

    `claim` is given the storage tags of the tensors below a layer's path (such as
    {"weight": "Q4_1"}) and the checkpoint's `quantization_config` (empty when it has none), and
    says whether `weight.from_tensors` reads them. `cases` yields weights of every variant that the
    format has; the contract test runs on them. `tag`, of the same arguments as `claim`, is the
    storage tag that `from_tensors` is given: all that the tensors themselves do not say. It raises
    CheckpointError for a config that the format cannot be read by. Default: the tag of "weight".
    `check`, given what was read and the config, raises CheckpointError where they contradict each
    other. `methods` are the values of `quant_method` that are this format's.
    """

    name: str
    weight: type[QuantWeight]
    claim: Claim
    cases: Callable[[], Iterable[Case]]
    tag: Tag = _weight_tag
    check: Check = _agree
    methods: tuple[str, ...] = ()


@cache
def formats() -> tuple[Format, ...]:
    """Every format of this folder."""
    modules = (
        importlib.import_module(f"qwenkit.formats.{info.name}")
        for info in pkgutil.iter_modules(qwenkit.formats.__path__)
    )
    return tuple(cast(Format, m.FORMAT) for m in modules if hasattr(m, "FORMAT"))


def claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> Format | None:
    """The format that reads these tensors; None when they are plain numbers or unknown."""
    return next((f for f in formats() if f.claim(storage, quantization_config)), None)
