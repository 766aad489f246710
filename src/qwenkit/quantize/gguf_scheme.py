"""Which tensor of a GGUF file becomes which type: llama.cpp's own mixtures, by their names there.

A mixture has one type for most matrices and better ones where an error costs more: in the head, in
values, in the feed-forward matrices that lead back, in the first and last layers. The rules are
those of llama.cpp's `llama-quant.cpp`, so that a file of ours has the types that `llama-quantize`
would choose. Pure: names and shapes in, storage tags out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwenkit.checkpoint.storages import BLOCKS
from qwenkit.errors import UsageError, suggest


@dataclass(frozen=True, slots=True)
class Scheme:
    """A mixture: its name, the type of most matrices, and its number in `general.file_type`."""

    name: str
    base: str
    file_type: int

    @property
    def is_quantized(self) -> bool:
        return self.base in BLOCKS


SCHEMES: Mapping[str, Scheme] = {
    name: Scheme(name, base, number)
    for name, base, number in (
        ("f32", "F32", 0),
        ("f16", "F16", 1),
        ("bf16", "BF16", 32),
        ("q8_0", "Q8_0", 7),
        ("q6_k", "Q6_K", 18),
        ("q5_k_m", "Q5_K", 17),
        ("q5_k_s", "Q5_K", 16),
        ("q5_1", "Q5_1", 9),
        ("q5_0", "Q5_0", 8),
        ("q4_k_m", "Q4_K", 15),
        ("q4_k_s", "Q4_K", 14),
        ("q4_1", "Q4_1", 3),
        ("q4_0", "Q4_0", 2),
        ("iq4_nl", "IQ4_NL", 25),
        ("iq4_xs", "IQ4_XS", 30),
        ("q3_k_l", "Q3_K", 13),
        ("q3_k_m", "Q3_K", 12),
        ("q3_k_s", "Q3_K", 11),
        ("q2_k", "Q2_K", 10),
    )
}

# What stands in where a row is no whole number of blocks of 256.
_SMALLER_BLOCKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
_LAYER = re.compile(r"blk\.(\d+)\.")
_VALUES = ("attn_v.weight", "attn_qkv.weight")


@dataclass(frozen=True, slots=True)
class Choice:
    """The storage tag of a tensor, and the one that the mixture wanted for it: another where the
    blocks of that do not fill its rows.
    """

    tag: str
    wanted: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the mixtures ask of a model beside its tensors. `arch` is GGUF's name of it."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def queries_per_key(self) -> int:
        return self.heads // self.kv_heads

    @property
    def is_70b(self) -> bool:
        """What llama.cpp takes for a model of 70 billion with few heads of values."""
        if self.layers != 80:
            return False
        return self.arch == "qwen2" or (self.arch == "llama" and self.heads != self.kv_heads)


def find_scheme(name: str) -> Scheme:
    """Raises UsageError for an unknown name."""
    scheme = SCHEMES.get(name.lower()) if isinstance(name, str) else None
    if scheme is None:
        raise UsageError(f"gguf: got {name!r}. {suggest(name, SCHEMES)}")
    return scheme


def choose_storages(
    scheme: Scheme,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    facts: ModelFacts,
    *,
    has_importance: bool,
) -> dict[str, Choice]:
    """The type of each of `tensors`, names and shapes as the file has them (outermost first).
    Vectors, norms and the routers of experts are fp32 always.
    """
    values = sorted(_layer(name) for name, _ in tensors if name.endswith(_VALUES))
    is_tied = all(name != "output.weight" for name, _ in tensors)
    chosen = {}
    for name, shape in tensors:
        if not _is_quantized(name, shape):
            chosen[name] = Choice("F32", "F32")
            continue
        wanted = tag = scheme.base
        if scheme.is_quantized:
            place = _Place(name, values, facts, has_importance, is_tied, shape[-1])
            wanted = _mixed(scheme, place)
            tag = _fitting(wanted, shape[-1])
        chosen[name] = Choice(tag, wanted)
    return chosen


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    is_matrix = len(shape) > 1 and math.prod(shape[:-1]) > 1
    kept = ("_norm.weight", "ffn_gate_inp.weight")
    return is_matrix and name.endswith("weight") and not name.endswith(kept)


def _layer(name: str) -> int:
    number = _LAYER.match(name)
    return int(number[1]) if number else 0


def _fitting(tag: str, columns: int) -> str:
    """A type whose blocks fill rows of so many columns."""
    if columns % BLOCKS[tag].elements == 0:
        return tag
    smaller = _SMALLER_BLOCKS.get(tag, tag)
    return smaller if columns % BLOCKS[smaller].elements == 0 else "F16"


@dataclass(frozen=True, slots=True)
class _Place:
    """A matrix as the mixtures see it. `values` are the layers that have a matrix of values."""

    name: str
    values: Sequence[int]
    facts: ModelFacts
    has_importance: bool
    is_tied: bool
    columns: int

    @property
    def layer(self) -> int:
        return _layer(self.name)

    @property
    def value_index(self) -> int:
        return self.values.index(self.layer)

    @property
    def gets_more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        if self.name.endswith(_VALUES):
            return _gets_more_bits(self.value_index, len(self.values))
        return _gets_more_bits(self.layer, self.facts.layers)

    @property
    def is_early(self) -> bool:
        return self.layer < self.facts.layers // 8


def _gets_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _mixed(scheme: Scheme, place: _Place) -> str:
    name = place.name
    if name == "output.weight" or (place.is_tied and name == "token_embd.weight"):
        if place.columns % BLOCKS[scheme.base].elements or scheme.base == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    if name.endswith(_VALUES):
        return _for_values(scheme, place)
    if name.endswith("attn_k.weight"):
        return "Q8_0" if place.facts.experts == 8 else scheme.base
    if "ffn_down" in name:
        rule = _FFN_DOWN.get(scheme.name)
        return (rule(place) if rule is not None else None) or scheme.base
    if name.endswith("attn_output.weight"):
        if place.facts.experts == 8:
            return "Q5_K" if scheme.name in _FINER_OUTPUT_OF_8 else scheme.base
        return _OUTPUT.get(scheme.name, scheme.base)
    return scheme.base


def _for_values(scheme: Scheme, place: _Place) -> str:
    rule = _VALUE_RULES.get(scheme.name)
    tag = (rule(place) if rule is not None else None) or scheme.base
    if place.facts.is_70b and tag in ("Q3_K", "Q4_K"):
        tag = "Q5_K"  # eight times smaller than the queries there
    return "Q8_0" if place.facts.experts == 8 else tag


Rule = Callable[[_Place], str | None]


def _q6_for_more_bits(place: _Place) -> str | None:
    return "Q6_K" if place.gets_more_bits else None


def _q5_for_shared(place: _Place) -> str | None:
    return "Q5_K" if place.facts.queries_per_key >= 4 else None


def _q5_without_importance(place: _Place) -> str | None:
    return "Q5_K" if place.is_early and not place.has_importance else None


_VALUE_RULES: Mapping[str, Rule] = {
    "q2_k": lambda place: "Q4_K" if place.facts.queries_per_key >= 4 else "Q3_K",
    "q3_k_m": lambda place: "Q5_K" if place.value_index < 2 else "Q4_K",
    "q3_k_l": lambda place: "Q5_K",
    "q4_k_s": lambda place: "Q5_K" if place.value_index < 4 else None,
    "q4_k_m": _q6_for_more_bits,
    "q5_k_m": _q6_for_more_bits,
    "iq4_nl": _q5_for_shared,
    "iq4_xs": _q5_for_shared,
}
_FFN_DOWN: Mapping[str, Rule] = {
    "q2_k": lambda place: "Q3_K",
    "q3_k_m": lambda place: "Q5_K" if place.layer < place.facts.layers // 16 else "Q4_K",
    "q3_k_l": lambda place: "Q5_K",
    "q4_k_s": lambda place: "Q5_K" if place.is_early else None,
    "q4_k_m": _q6_for_more_bits,
    "q5_k_m": _q6_for_more_bits,
    "iq4_nl": _q5_without_importance,
    "iq4_xs": _q5_without_importance,
    "q4_0": lambda place: "Q4_1" if place.is_early and place.has_importance else None,
    "q5_0": lambda place: "Q5_1" if place.is_early and place.has_importance else None,
}
_OUTPUT = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
_FINER_OUTPUT_OF_8 = (*("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"),)
