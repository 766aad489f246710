"""The same texts as transformers renders from the same templates, on random conversations."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenkit.chat.render import render
from qwenkit.errors import TemplateError
from qwenkit.types.messages import parse_messages, parse_tools

sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
from chat_fakes import TEMPLATE_NAMES, TEMPLATES, ControlBytes, published_record, template_record

pytestmark = pytest.mark.oracle
oracle = pytest.importorskip("transformers.utils.chat_template_utils")

WORDS = [
    "你好",
    "world",
    "é",
    "😀",
    '"quoted"',
    "back\\slash",
    "<b>&amp;",
    "\n",
    "\t",
    " ",
    "{x}",
    "",
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": 'Looks "up" é <b>.',
            "parameters": {
                "type": "object",
                "properties": {"词": {"type": "string", "description": "a\nb"}},
                "required": ["词"],
            },
        },
    }
]
OTHER = (
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}{{ loop.index }}{{ m.content|upper|replace(' ', '_') }}{% endfor %}",
    "{% for m in messages %}{{ m.content | indent(3, true) }}{{ m.content.title() }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split() }}{{ m.content | length }}{% endfor %}",
    "{{ messages | map(attribute='content') | join(', ') | capitalize }}",
    "{{ messages | selectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
    "{{ messages | map(attribute='content') | sort | unique | list }}",
    "{% for m in messages %}{{ '%s|%5s' % (m.role, m.content) }}{% endfor %}",
)


def conversations(seed: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Random conversations in which no content spells a control token."""
    source = random.Random(seed)

    def text() -> str:
        return "".join(source.choices(WORDS, k=source.randrange(1, 6)))

    for _ in range(count):
        messages: list[dict[str, Any]] = []
        if source.random() < 0.5:
            messages.append({"role": "system", "content": text()})
        for _ in range(source.randrange(1, 4)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
            if source.random() < 0.5:
                arguments = {text() or "k": source.choice([text(), 1, 2.5, None, [text()]])}
                function = {"name": text() or "f", "arguments": arguments}
                messages[-1]["tool_calls"] = [{"type": "function", "function": function}]
                messages.append({"role": "tool", "content": text()})
                messages.append({"role": "assistant", "content": text()})
        messages.append({"role": "user", "content": "and?"})
        yield messages


def theirs(source: str, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
    rendered, _ = oracle.render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    return str(rendered[0])


@pytest.mark.parametrize("name", [*TEMPLATE_NAMES, *OTHER])
def test_texts_and_ids_equal(name: str) -> None:
    published = name in TEMPLATE_NAMES
    source = (TEMPLATES / name).read_text(encoding="utf-8") if published else name
    record = published_record(name) if published else template_record(source)
    tokenizer, compared = ControlBytes(), 0
    for i, messages in enumerate(conversations(seed=5, count=60)):
        tools = TOOLS if i % 2 else None
        options = {"add_generation_prompt": i % 3 > 0}
        expected = theirs(source, messages, tools, options["add_generation_prompt"])
        result = render(
            parse_messages(json.loads(json.dumps(messages))),
            tokenizer=tokenizer,
            record=record,
            tools=parse_tools(tools or ()),
            **options,
        )
        assert result.text == expected
        if published:
            assert list(result.ids) == tokenizer.encode(expected, allowed_special="all")
        compared += 1
    assert compared == 60


def test_both_refuse_the_same_conversation() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}]
    name = "Qwen3.5-4B.jinja"
    with pytest.raises(Exception, match="System message must be at the beginning"):
        theirs((TEMPLATES / name).read_text(encoding="utf-8"), messages, None, True)
    with pytest.raises(TemplateError, match="System message must be at the beginning"):
        render(parse_messages(messages), tokenizer=ControlBytes(), record=published_record(name))
