"""Checks of the chat template: that it is there, and that a trial conversation comes through it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwenkit.chat.render import Rendered, render
from qwenkit.chat.template import compile_template
from qwenkit.errors import QwenkitError, TemplateError, TokenizerError
from qwenkit.record import read_record
from qwenkit.survey.doctor_facts import Facts, Finding, fault
from qwenkit.types.messages import Message

_GENERATION = "generation_config.json"
_SETTINGS = "tokenizer_config.json"
_CONTROL = re.compile(r"<\|[a-z_]+\|>")
_TRIAL = "hello"


def template_is_there(facts: Facts) -> Iterator[Finding]:
    if facts.tokenizer is None or facts.checkpoint is None or (facts.template or "").strip():
        return
    if facts.template is None and "<|im_start|>" not in facts.tokenizer.control_tokens:
        return
    if facts.template is None and facts.model_type == "qwen":
        if facts.generation.get("chat_format") is None:
            yield fault(
                "no-chat-format",
                _GENERATION,
                "chat_format is missing: 'chatml' for a chat model of the first generation, 'raw' "
                "for a base model.",
                "缺少 chat_format：第一代对话模型应为 'chatml'，基座模型应为 'raw'。",
            )
        return
    there, chinese = "there is no", "没有 chat_template"
    if facts.template is not None:
        there, chinese = "there is only an empty", "chat_template 为空"
    yield fault(
        "no-template",
        _SETTINGS,
        f"{there} chat_template, so the model cannot be chatted with. Copy it from the "
        "original model's tokenizer_config.json.",
        f"{chinese}，无法对话。请从原模型的 tokenizer_config.json 复制。",
    )


def template_compiles(facts: Facts) -> Iterator[Finding]:
    if facts.template is None:
        return
    try:
        compile_template(facts.template)
    except TemplateError as error:
        yield fault(
            "broken-template",
            "chat_template",
            f"cannot be used: {error}",
            f"对话模板无法使用：{error}",
        )


def template_tokens(facts: Facts) -> Iterator[Finding]:
    if facts.template is None or facts.tokenizer is None:
        return
    used = set(_CONTROL.findall(facts.template))
    for token in sorted(used - set(facts.tokenizer.control_tokens)):
        yield fault(
            "template-token",
            "chat_template",
            f"writes {token}, which the tokenizer does not know as one token: template and "
            "tokenizer are of two models.",
            f"使用了 {token}，但分词器没有这个控制词元：模板与分词器不属于同一模型。",
        )


def template_renders(facts: Facts) -> Iterator[Finding]:
    """One turn of a user must come through; a system message need not be supported."""
    if not (facts.template or "").strip() or not (
        facts.checkpoint and facts.tokenizer and facts.model_config
    ):
        return
    try:
        compile_template(facts.template)
        record = read_record(facts.checkpoint, facts.tokenizer, facts.model_config)
    except QwenkitError:
        return  # found elsewhere
    try:
        rendered = render([Message("user", _TRIAL)], tokenizer=facts.tokenizer, record=record)
    except TokenizerError:
        return  # a special token that is none, found elsewhere
    except QwenkitError as error:
        yield fault(
            "failing-template",
            "chat_template",
            f"fails on a single message of a user ({error}). Copy it from the original model's "
            "tokenizer_config.json.",
            f"对话模板处理一条用户消息时出错（{error}）。请从原模型的 tokenizer_config.json 复制。",
        )
        return
    yield from _trial_faults(rendered, facts, record.stop_token_ids)


def _trial_faults(rendered: Rendered, facts: Facts, stops: tuple[int, ...]) -> Iterator[Finding]:
    if _TRIAL not in rendered.text:
        yield fault(
            "template-drops-text",
            "chat_template",
            "leaves out what the user says. Copy it from the original model's "
            "tokenizer_config.json.",
            "对话模板丢弃了用户的消息。请从原模型的 tokenizer_config.json 复制。",
        )
        return
    assert facts.tokenizer is not None
    ends = [t for t, token_id in facts.tokenizer.control_tokens.items() if token_id in stops]
    if rendered.text.rstrip().endswith(tuple(ends)):
        yield fault(
            "no-generation-prompt",
            "chat_template",
            "does not open the assistant's turn after the user's: the model may write the user's "
            "next message instead. Heed add_generation_prompt, as the original's template does.",
            "对话模板没有在用户消息后开始助手的轮次，模型可能替用户说话。"
            "请像原模型的模板那样处理 add_generation_prompt。",
        )


CHECKS = (template_is_there, template_compiles, template_tokens, template_renders)
