"""Checks of config.json: keys that are misspelt or dead, and values that cannot be meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from qwenkit.errors import suggest
from qwenkit.formats.config import known_methods
from qwenkit.models.catalogue import PUBLISHED
from qwenkit.models.spec import architectures
from qwenkit.survey import doctor_keys, doctor_rope
from qwenkit.survey.doctor_facts import Facts, Finding, fault, note

_FILE = "config.json"
_NEAR = 0.85  # a letter more, less or other in a word of ten
_NEARER = 0.9  # beside the key that it resembles, where it may be a key of its own


def misspelt_keys(facts: Facts) -> Iterator[Finding]:
    scaling = facts.config.get("rope_scaling")
    for file, given, known in (
        (_FILE, facts.config, doctor_keys.CONFIG),
        (_FILE, scaling if isinstance(scaling, Mapping) else {}, doctor_keys.ROPE_SCALING),
        ("generation_config.json", facts.generation, doctor_keys.GENERATION),
        ("tokenizer_config.json", facts.tokenizer_config, doctor_keys.TOKENIZER),
    ):
        for key in sorted(set(given) - known):
            near = difflib.get_close_matches(key, known - set(given), n=1, cutoff=_NEAR)
            twice = difflib.get_close_matches(key, known & set(given), n=1, cutoff=_NEARER)
            if near and not twice:
                yield fault(
                    "misspelt-key",
                    file,
                    f"{key}: nobody reads this key; {near[0]} was probably meant.",
                    f"{key}：没有程序读取该键，可能应为 {near[0]}。",
                )
            elif twice:
                yield fault(
                    "misspelt-key",
                    file,
                    f"{key}: nobody reads this key; {twice[0]} is there too, and counts. Remove "
                    "the one that is misspelt.",
                    f"{key}：没有程序读取该键，起作用的是 {twice[0]}，请删除拼错的键。",
                )


def dead_keys(facts: Facts) -> Iterator[Finding]:
    """Switches that the architecture does not have, so that turning them on does nothing."""
    if facts.architecture is None or facts.folder is None:  # a GGUF's keys are translated
        return
    dead = doctor_keys.LATER if facts.model_type == "qwen" else doctor_keys.FIRST_SWITCHES
    if "moe" not in facts.model_type:
        dead = dead | doctor_keys.EXPERTS
    if facts.model_type.startswith("qwen"):
        dead = dead | doctor_keys.BIASES
    if facts.model_type.startswith("qwen3"):
        dead = dead - {"attention_bias"}
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
    if error and facts.architecture and not doctor_rope.explains(facts, error):
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
        f"rms_norm_eps is {given:g}; models of this kind were trained with {allowed}. All outputs "
        "differ.",
        f"rms_norm_eps 为 {given:g}，该类模型训练时为 {allowed}，所有输出都会有偏差。",
    )


def _published_eps(config: Mapping[str, Any]) -> set[float]:
    """What published models of this shape have; of an unknown shape, what any of its type has."""
    shape = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
    published = [p.config for p in PUBLISHED.values() if "rms_norm_eps" in p.config]
    same = [p for p in published if all(p.get(key) == config.get(key) for key in shape)]
    kind = [p for p in published if p["model_type"] == config.get("model_type")]
    return {float(p["rms_norm_eps"]) for p in same or kind} | {1e-6}


def quantization(facts: Facts) -> Iterator[Finding]:
    block = facts.config.get("quantization_config")
    methods = known_methods()
    if block is not None and not isinstance(block, Mapping):
        yield fault(
            "bad-quantization",
            _FILE,
            f"quantization_config is {block!r}; expected an object that names quant_method. Remove "
            "it where the weights are plain.",
            f"quantization_config 为 {block!r}，应为包含 quant_method 的对象；"
            "权重未量化时请删除该项。",
        )
    elif isinstance(block, Mapping) and block.get("quant_method") not in methods:
        given = block.get("quant_method")
        yield fault(
            "unknown-quantization",
            _FILE,
            f"quantization_config: quant_method is {given!r}. {suggest(str(given), methods)}",
            f"quantization_config：未知的 quant_method {given!r}。{suggest(str(given), methods)}",
        )


CHECKS = (
    misspelt_keys,
    dead_keys,
    windows,
    model_types,
    class_names,
    shapes,
    eps,
    quantization,
)
