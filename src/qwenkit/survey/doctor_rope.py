"""Checks of what config.json says of positions: the rotary base and its scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwenkit.errors import ConfigError, suggest
from qwenkit.models.config_rope import ROPE_TYPES, rope_factor, rope_kind
from qwenkit.survey.doctor_facts import Facts, Finding, fault

_FILE = "config.json"


def rope_base(facts: Facts) -> Iterator[Finding]:
    parameters = facts.config.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
    is_file = facts.folder is not None  # a GGUF's are translated, and always there
    if is_file and facts.is_llm_of_qwen and facts.config.get("rope_theta", inner) is None:
        yield fault(
            "no-rope-theta",
            _FILE,
            "rope_theta is missing and falls back to 10000; published Qwen models have 1000000. "
            "Text becomes garbage.",
            "缺少 rope_theta，将使用默认值 10000；发布的 Qwen 模型为 1000000，输出会是乱码。",
        )


def rope_scaling(facts: Facts) -> Iterator[Finding]:
    block = facts.config.get("rope_scaling")
    if not isinstance(block, Mapping):
        return
    kind = rope_kind(block)
    if {"type", "rope_type"} <= set(block) and block["type"] != block["rope_type"]:
        yield fault(
            "two-rope-types",
            _FILE,
            f"rope_scaling: type is {block['type']!r}, rope_type {block['rope_type']!r}; programs "
            "read the one or the other. Keep one.",
            f"rope_scaling：type 为 {block['type']!r}，rope_type 为 {block['rope_type']!r}，"
            "不同程序读取不同的键，请只保留一个。",
        )
    if kind not in ROPE_TYPES:
        yield fault(
            "bad-rope-scaling",
            _FILE,
            f"rope_scaling: type {kind!r} is unknown. {suggest(str(kind), ROPE_TYPES)}",
            f"rope_scaling：未知类型 {kind!r}。{suggest(str(kind), ROPE_TYPES)}",
        )
    elif kind not in ("default", "llama3") and _no_factor(facts, block):
        yield fault(
            "bad-rope-factor",
            _FILE,
            f"rope_scaling: factor is {block.get('factor')!r}; expected a number of 1 or more, "
            "such as 4.0.",
            f"rope_scaling：factor 为 {block.get('factor')!r}，应为不小于 1 的数，例如 4.0。",
        )
    elif kind == "yarn" and _trained(facts, block) is None:
        yield fault(
            "no-yarn-length",
            _FILE,
            "rope_scaling: original_max_position_embeddings is missing; for Qwen2 and Qwen2.5 it "
            "is 32768.",
            "rope_scaling：缺少 original_max_position_embeddings；Qwen2 与 Qwen2.5 为 32768。",
        )


def _no_factor(facts: Facts, block: Mapping[str, Any]) -> bool:
    """Whether loading refuses the factor; YaRN's is computed where the trained length is given."""
    if rope_kind(block) == "yarn" and block.get("factor") is None:
        return _trained(facts, block) is None
    try:
        rope_factor(block)
    except ConfigError:
        return True
    return False


def _trained(facts: Facts, block: Mapping[str, Any]) -> Any:
    key = "original_max_position_embeddings"
    beside = facts.config.get(key)
    return block.get(key) if beside is None else beside


def explains(facts: Facts, error: ConfigError) -> bool:
    """Whether a check here has found what loading says."""
    return str(error).startswith("rope_scaling:") and any(rope_scaling(facts))


CHECKS = (rope_base, rope_scaling)
