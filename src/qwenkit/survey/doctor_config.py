"""Checks of config.json: keys that are misspelt or dead, and values that cannot be meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from qwenkit.errors import suggest
from qwenkit.models.catalogue import PUBLISHED
from qwenkit.models.spec import architectures
from qwenkit.survey import doctor_keys
from qwenkit.survey.doctor_facts import Facts, Finding, fault, note

_FILE = "config.json"
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "ntk", "dual_chunk")
_NEAR = 0.85  # a letter more, less or other in a word of ten


def misspelt_keys(facts: Facts) -> Iterator[Finding]:
    for file, given, known in (
        (_FILE, facts.config, doctor_keys.CONFIG),
        ("generation_config.json", facts.generation, doctor_keys.GENERATION),
        ("tokenizer_config.json", facts.tokenizer_config, doctor_keys.TOKENIZER),
    ):
        for key in sorted(set(given) - known):
            near = difflib.get_close_matches(key, known - set(given), n=1, cutoff=_NEAR)
            if near:
                yield fault(
                    "misspelt-key",
                    file,
                    f"{key}: nobody reads this key; {near[0]} was probably meant.",
                    f"{key}：没有程序读取该键，可能应为 {near[0]}。",
                )


def dead_keys(facts: Facts) -> Iterator[Finding]:
    """Switches that the architecture does not have, so that turning them on does nothing."""
    if facts.architecture is None or facts.folder is None:  # a GGUF's keys are translated
        return
    dead = doctor_keys.LATER if facts.model_type == "qwen" else doctor_keys.FIRST_SWITCHES
    if "moe" not in facts.model_type:
        dead = dead | doctor_keys.EXPERTS
    for key in sorted(dead):
        if facts.config.get(key) not in (None, False):
            yield fault(
                "dead-key",
                _FILE,
                f"{key}: models of type {facts.model_type!r} do not have it; it changes nothing. "
                "Remove it.",
                f"{key}：{facts.model_type!r} 模型没有该选项，不起作用，请删除。",
            )


def windows(facts: Facts) -> Iterator[Finding]:
    config = facts.config
    layers, first = config.get("num_hidden_layers"), config.get("max_window_layers")
    if config.get("use_sliding_window") is True:
        if isinstance(layers, int) and isinstance(first, int) and first >= layers:
            yield fault(
                "dead-window",
                _FILE,
                f"use_sliding_window is true, but max_window_layers {first} leaves none of the "
                f"{layers} layers a window. Set it to false or lower max_window_layers.",
                f"use_sliding_window 为 true，但 max_window_layers {first} 使 {layers} "
                "层都不用滑动窗口。",
            )
    elif config.get("use_sliding_window") is False and config.get("sliding_window"):
        yield note(
            "unused-window",
            _FILE,
            "sliding_window and max_window_layers do nothing while use_sliding_window is false, "
            "as published.",
            "use_sliding_window 为 false 时 sliding_window 与 max_window_layers 不起作用"
            "（发布的文件即如此）。",
        )


def model_types(facts: Facts) -> Iterator[Finding]:
    if not facts.config:
        return
    if "model_type" not in facts.config:
        yield fault(
            "no-model-type",
            _FILE,
            "model_type is missing; for Qwen2 and Qwen2.5 it is 'qwen2'.",
            "缺少 model_type；Qwen2 与 Qwen2.5 为 'qwen2'。",
        )
    elif facts.architecture is None:
        yield fault(
            "unknown-model-type",
            _FILE,
            f"model_type {facts.model_type!r} is not known here. "
            + suggest(facts.model_type, architectures()),
            f"未知的 model_type {facts.model_type!r}。{suggest(facts.model_type, architectures())}",
        )


def class_names(facts: Facts) -> Iterator[Finding]:
    names = facts.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not facts.model_type:
        return
    family = name.partition("For")[0].partition("LMHead")[0].lower()
    if family != facts.model_type.replace("_", "").lower():
        yield fault(
            "architectures-mismatch",
            _FILE,
            f"architectures names {name!r}, but model_type is {facts.model_type!r}: parts of two "
            "models. Take config.json from the model's own repository.",
            f"architectures 为 {name!r}，而 model_type 为 {facts.model_type!r}，"
            "两者不属于同一模型。",
        )


def shapes(facts: Facts) -> Iterator[Finding]:
    error = facts.config_error
    if error and facts.architecture and not any(rope_scaling(facts)):
        yield fault(
            "bad-config",
            _FILE,
            f"cannot be used: {error}",
            f"无法使用：{error}",
        )


def eps(facts: Facts) -> Iterator[Finding]:
    given = facts.config.get("rms_norm_eps")
    if isinstance(given, bool) or not isinstance(given, int | float) or not facts.is_llm_of_qwen:
        return
    trained = _published_eps(facts.config)
    if given in trained:
        return
    allowed = " or ".join(f"{value:g}" for value in sorted(trained))
    yield fault(
        "wrong-eps",
        _FILE,
        f"rms_norm_eps is {given:g}; models of this kind were trained with {allowed}. Outputs "
        "differ slightly everywhere.",
        f"rms_norm_eps 为 {given:g}，该类模型训练时为 {allowed}，所有输出都会有细微差别。",
    )


def _published_eps(config: Mapping[str, Any]) -> set[float]:
    """What published models of this shape have; of an unknown shape, what any of its type has."""
    shape = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
    published = [p.config for p in PUBLISHED.values() if "rms_norm_eps" in p.config]
    same = [p for p in published if all(p.get(key) == config.get(key) for key in shape)]
    kind = [p for p in published if p["model_type"] == config.get("model_type")]
    return {float(p["rms_norm_eps"]) for p in same or kind} | {1e-6}


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
    kind = block.get("rope_type", block.get("type"))
    if {"type", "rope_type"} <= set(block) and block["type"] != block["rope_type"]:
        yield fault(
            "two-rope-types",
            _FILE,
            f"rope_scaling: type is {block['type']!r}, rope_type {block['rope_type']!r}; programs "
            "read the one or the other. Keep one.",
            f"rope_scaling：type 为 {block['type']!r}，rope_type 为 {block['rope_type']!r}，"
            "不同程序读取不同的键，请只保留一个。",
        )
    if kind not in _ROPE_TYPES:
        yield fault(
            "bad-rope-scaling",
            _FILE,
            f"rope_scaling: type {kind!r} is unknown. {suggest(str(kind), _ROPE_TYPES)}",
            f"rope_scaling：未知类型 {kind!r}。{suggest(str(kind), _ROPE_TYPES)}",
        )
    elif kind not in ("default", "llama3", "longrope") and not _above_one(block.get("factor")):
        yield fault(
            "bad-rope-factor",
            _FILE,
            f"rope_scaling: factor is {block.get('factor')!r}; expected a number of 1 or more, "
            "such as 4.0.",
            f"rope_scaling：factor 为 {block.get('factor')!r}，应为不小于 1 的数，例如 4.0。",
        )
    elif kind == "yarn" and block.get("original_max_position_embeddings") is None:
        yield fault(
            "no-yarn-length",
            _FILE,
            "rope_scaling: original_max_position_embeddings is missing; for Qwen2 and Qwen2.5 it "
            "is 32768.",
            "rope_scaling：缺少 original_max_position_embeddings；Qwen2 与 Qwen2.5 为 32768。",
        )


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def quantization(facts: Facts) -> Iterator[Finding]:
    block = facts.config.get("quantization_config")
    methods = ("gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "autoround")
    if isinstance(block, Mapping) and block.get("quant_method") not in methods:
        given = block.get("quant_method")
        yield fault(
            "unknown-quantization",
            _FILE,
            f"quantization_config: quant_method is {given!r}. {suggest(str(given), methods)}",
            f"quantization_config：未知的 quant_method {given!r}。{suggest(str(given), methods)}",
        )
    elif isinstance(block, Mapping) and facts.checkpoint is not None:
        names = facts.checkpoint.tensors
        if block["quant_method"] in ("gptq", "awq") and not any("qweight" in n for n in names):
            yield fault(
                "quantized-in-name-only",
                _FILE,
                f"quantization_config says {block['quant_method']}, but no weight is quantized. "
                "Remove it, or take the weights from the quantized model's repository.",
                f"quantization_config 为 {block['quant_method']}，但权重并未量化。"
                "请删除该项，或从量化模型仓库下载权重。",
            )


CHECKS = (
    misspelt_keys,
    dead_keys,
    windows,
    model_types,
    class_names,
    shapes,
    eps,
    rope_base,
    rope_scaling,
    quantization,
)
