"""What a renderer writes, the parser reads: every dialect, wherever the stream is split."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from chat_fakes import (
    TEMPLATE_NAMES,
    ControlBytes,
    chatml_record,
    published_record,
    template_record,
)
from reply_texts import DIALECTS, TOOLS, check_turn, deltas_of, joined, reply_of, some_turn
from test_dialect_prompts import CHATML

from qwenkit.chat.dialects.spec import shown_by
from qwenkit.chat.render import render
from qwenkit.types.messages import Message
from qwenkit.types.record import ModelRecord
from qwenkit.types.tools import ToolOptions

TOKENIZER = ControlBytes()
SHOWN = {
    "Qwen-QwQ-32B.jinja": "hermes",
    "Qwen-Qwen2.5-7B-Instruct.jinja": "hermes",
    "Qwen-Qwen3-0.6B.jinja": "hermes",
    "Qwen3-Coder.jinja": "qwen_xml",
    "Qwen3.5-4B.jinja": "qwen_xml",
    "qwen1.5-72b-chat-early.jinja": None,
    "qwen1.5.jinja": None,
    "qwen2.jinja": None,
}


def test_a_template_says_which_dialect_it_shows() -> None:
    found = {name: shown_by(published_record(name).chat_template or "") for name in TEMPLATE_NAMES}
    assert found == SHOWN


def record_of(form: str) -> ModelRecord:
    if form.endswith(".jinja"):
        return replace(published_record(form), dialect=SHOWN[form])
    made = chatml_record() if form == "react" else template_record(CHATML)
    return replace(made, dialect=form)


@pytest.mark.parametrize("form", [*DIALECTS, *(name for name, shown in SHOWN.items() if shown)])
def test_a_rendered_turn_is_read_as_what_it_was(form: str) -> None:
    record = record_of(form)
    for seed in range(16):
        draw = random.Random(f"{form} {seed}")
        turn = some_turn(record.dialect, draw, usual=form.endswith(".jinja"))
        rendered = render(
            [Message("user", "q"), turn],
            tokenizer=TOKENIZER,
            record=record,
            tools=TOOLS,
            add_generation_prompt=False,
        )
        text = rendered.text.rpartition("<|im_start|>assistant\n")[2].rstrip("\n")
        text = text.removesuffix("<|im_end|>")
        reader = replace(rendered.reply, start="")
        whole = joined(deltas_of(reader, [text]))
        for at in range(len(text) + 1):
            assert joined(deltas_of(reader, [text[:at], text[at:]])) == whole, (text, at)
        check_turn(reply_of(whole), turn)


@pytest.mark.parametrize("form", SHOWN)
def test_what_of_the_reply_stands_in_the_prompt(form: str) -> None:
    def start(messages: list[Message], **kwargs: Any) -> str:
        made = render(messages, tokenizer=TOKENIZER, record=record_of(form), **kwargs)
        return made.reply.start

    question = [Message("user", "<think>?")]
    opened = {"Qwen-QwQ-32B.jinja": "<think>\n</think>", "Qwen3.5-4B.jinja": "<think>\n"}
    assert start(question) == opened.get(form, "")
    if form in ("Qwen-Qwen3-0.6B.jinja", "Qwen3.5-4B.jinja"):
        silent = start(question, template_kwargs={"enable_thinking": False})
        assert silent == "<think>\n\n</think>\n\n"
    half = [*question, Message("assistant", "It is")]
    assert start(half, continue_final_message=True).endswith("It is")


def test_a_choice_of_none_reads_thoughts_still() -> None:
    rendered = render(
        [Message("user", "q")],
        tokenizer=TOKENIZER,
        record=record_of("Qwen-Qwen3-0.6B.jinja"),
        tools=TOOLS,
        tool_options=ToolOptions(choice="none"),
    )
    text = "<think>\na\n</think>\n\n<tool_call>\n{}\n</tool_call>"
    reply = rendered.reply.parsed(text)
    assert (reply.reasoning, reply.content) == ("a", "<tool_call>\n{}\n</tool_call>")
