"""The published formats, row by row: text and ids as the original templates give them.

The templates in `tests/golden/chat/templates` are written for these tests; their output was
compared with what the published ones gave (`rendered.json`).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import CONTROL, TEMPLATE_NAMES, ControlBytes, published_record

from qwenkit.chat.render import Rendered, render
from qwenkit.errors import TemplateError
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.messages import parse_messages, parse_tools
from qwenkit.types.protocols import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "chat" / "rendered.json"
DATA: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
QWQ = "Qwen-QwQ-32B.jinja"
# These take an assistant's content apart at `</think>` and write the tokens themselves.
REWRITE_THINKING = (QWQ, "Qwen-Qwen3-0.6B.jinja", "Qwen3.5-4B.jinja")


def rows(template: str) -> list[dict[str, Any]]:
    return [row for row in DATA["rendered"] if row["template"] == template]


def rendered(row: dict[str, Any], tokenizer: Tokenizer) -> Rendered:
    kwargs = {"enable_thinking": row["enable_thinking"]} if "enable_thinking" in row else None
    return render(
        parse_messages(row["messages"]),
        tokenizer=tokenizer,
        record=published_record(row["template"]),
        tools=parse_tools(DATA["tools"] if row["tools"] else ()),
        add_generation_prompt=row["add_generation_prompt"],
        template_kwargs=kwargs,
    )


def test_every_row_has_a_template() -> None:
    counts = Counter(row["template"] for row in DATA["rendered"])
    assert sorted(counts) == TEMPLATE_NAMES
    assert sum(counts.values()) == 286


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_text_and_ids_equal_the_published_templates(template: str, qwen: BytePairTokenizer) -> None:
    for row in rows(template):
        if "error" in row:
            with pytest.raises(TemplateError, match=row["error"].split(": ", 1)[1]):
                rendered(row, qwen)
            continue
        result = rendered(row, qwen)
        assert result.text == row["output"], row["case"]
        published = qwen.encode(row["output"], allowed_special="all")
        if row["case"] == "injection":  # where the published ids let the user speak as the system
            assert list(result.ids) != published
            assert qwen.decode(result.ids) == row["output"]
        else:
            assert list(result.ids) == published, row["case"]


def holds_control_text(row: dict[str, Any]) -> bool:
    """Whether a content that the template passes on spells a control token."""
    contents = [m["content"] for m in row["messages"]]
    if row["template"] in REWRITE_THINKING:
        contents = [m["content"] for m in row["messages"] if m["role"] != "assistant"]
    if row["template"] == QWQ:  # which leaves the last message alone
        contents.append(row["messages"][-1]["content"])
    return any(name in content for content in contents for name in CONTROL)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_what_the_template_writes_itself_becomes_control_tokens(template: str) -> None:
    tokenizer, equal = ControlBytes(), 0
    for row in rows(template):
        if "error" in row:
            continue
        ids = list(rendered(row, tokenizer).ids)
        published = tokenizer.encode(row["output"], allowed_special="all")
        assert (ids == published) is not holds_control_text(row), row["case"]
        assert tokenizer.decode(ids) == row["output"]
        equal += ids == published
    assert equal >= 24
