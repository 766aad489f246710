"""Checks of generation_config.json: the defaults of sampling and of lengths."""

from __future__ import annotations

from collections.abc import Iterator

from qwenkit.errors import RequestError, suggest
from qwenkit.record import given_sampling
from qwenkit.survey.doctor_facts import Facts, Finding, fault, note

_GENERATION = "generation_config.json"
_CHAT_FORMATS = ("chatml", "raw")


def sampling(facts: Facts) -> Iterator[Finding]:
    given = facts.generation
    try:
        if not isinstance(given.get("do_sample", False), bool | None):
            expected = f"expected true or false, got {given['do_sample']!r}."
            raise RequestError("do_sample", expected)
        given_sampling(given)
    except RequestError as error:
        yield fault("bad-sampling", _GENERATION, str(error), f"采样参数有误：{error}")
        return
    if facts.generation.get("do_sample") is True and given.get("temperature") == 0:
        yield fault(
            "sampling-at-zero",
            _GENERATION,
            "do_sample is true, but temperature is 0: other programs fail. Set do_sample to false "
            "for greedy decoding.",
            "do_sample 为 true 而 temperature 为 0，其他程序会报错。贪心解码请将 do_sample "
            "设为 false。",
        )


def chat_formats(facts: Facts) -> Iterator[Finding]:
    given = facts.generation.get("chat_format")
    if given is not None and given not in _CHAT_FORMATS:
        yield fault(
            "unknown-chat-format",
            _GENERATION,
            f"chat_format is {given!r}; {suggest(str(given), _CHAT_FORMATS)}",
            f"未知的 chat_format {given!r}。{suggest(str(given), _CHAT_FORMATS)}",
        )


def lengths(facts: Facts) -> Iterator[Finding]:
    least, most = (facts.generation.get(f"{word}_new_tokens") for word in ("min", "max"))
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield fault(
            "contradicting-lengths",
            _GENERATION,
            f"min_new_tokens {least} is above max_new_tokens {most}: no reply can be both. "
            "Correct one.",
            f"min_new_tokens {least} 大于 max_new_tokens {most}，相互矛盾，请更正其一。",
        )


def unused_sampling(facts: Facts) -> Iterator[Finding]:
    given = facts.generation
    unused = [k for k in ("temperature", "top_p", "top_k") if given.get(k) not in (None, 0, 1)]
    if given.get("do_sample") is False and unused:
        names = ", ".join(unused)
        yield note(
            "unused-sampling",
            _GENERATION,
            f"do_sample is false, so {names} do nothing; remove them or set it to true.",
            f"do_sample 为 false，{names} 不起作用；请删除，或将 do_sample 设为 true。",
        )


def defaults(facts: Facts) -> Iterator[Finding]:
    is_chat = facts.folder is not None and facts.template is not None
    if is_chat and facts.is_llm_of_qwen and _GENERATION not in facts.files:
        yield fault(
            "no-generation-config",
            _GENERATION,
            "is missing: programs will use their own sampling instead of the model's, which can "
            "repeat endlessly. Fetch it.",
            "缺失：程序会使用自己的采样参数而不是模型的，可能无休止地重复，请下载。",
        )


CHECKS = (sampling, chat_formats, lengths, unused_sampling, defaults)
