"""What a constraint allows, a dialect's parser reads: random outputs under every kind of choice."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy
import pytest
from chat_fakes import CONTROL, END, ControlBytes

from qwenkit.chat.dialects.spec import find
from qwenkit.chat.replies import ReplyFormat
from qwenkit.engine.constrain import Grammars
from qwenkit.errors import RequestError
from qwenkit.types.constraint import Constraint
from qwenkit.types.messages import Tool
from qwenkit.types.tools import ToolOptions

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"enum": [1, 2]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (
    Tool('we"ather', "Weather.", CITY, strict=True),
    Tool("get_time", "Time.", {"properties": {}, "additionalProperties": False}, strict=True),
)
ENUM = {"type": "string", "enum": ["a", "\n"]}  # a text of a certain length cannot be held there
XML_CITY = CITY | {"properties": {"city": ENUM, "days": {"enum": [1, 2]}}}
XML_TOOLS = (replace(TOOLS[0], parameters=XML_CITY), TOOLS[1])
PLAIN = [name for name in CONTROL if name.startswith("<|")]
DIALECTS = [
    *(("hermes", "", PLAIN), ("hermes", "", CONTROL)),
    *(("qwen_fn", "", PLAIN), ("qwen_fn", "✿RETURN✿", PLAIN)),
    *(("react", "", PLAIN), ("react", "Thought:", PLAIN)),
    *(("qwen_xml", "", PLAIN), ("qwen_xml", "", CONTROL)),
]


def form(
    dialect: str, start: str, control: Any, thinks: bool = False, **options: Any
) -> ReplyFormat:
    return ReplyFormat(
        dialect=find(dialect),
        tools=XML_TOOLS if dialect == "qwen_xml" else TOOLS,
        options=ToolOptions(**options),
        start=start,
        thinks=thinks,
        control_tokens=frozenset(control),
    )


def walk(constraint: Constraint, control: Any, seed: int, first: str = "") -> str:
    """A random output that begins with `first` and keeps the constraint."""
    tokenizer = ControlBytes(control)
    end = tokenizer.control_tokens["<|im_end|>"]
    matcher = Grammars(tokenizer, tokenizer.vocab_size).matcher(constraint, [end])
    draw = random.Random(seed)
    ids = tokenizer.encode(first, allowed_special="all")
    for token_id in ids:
        assert matcher.mask()[token_id], (
            first,
            tokenizer.decode(ids),
            tokenizer.decode([token_id]),
        )
        matcher.consume(token_id)
    while not matcher.is_complete and len(ids) < 600:
        allowed = numpy.flatnonzero(matcher.mask()).tolist()
        if end in allowed and draw.random() < 0.5:
            break
        likely = [i for i in allowed if (i < 128 and chr(i) in '}"a1<\n:,') or 256 <= i != end]
        choice = draw.choice(likely or [i for i in allowed if i != end])
        matcher.consume(choice)
        ids.append(choice)
    assert matcher.may_end, tokenizer.decode(ids)
    return tokenizer.decode(ids)


def valid(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "get_time":
        return value == {}
    return (
        name == 'we"ather'
        and {"city"} <= set(value) <= {"city", "days"}
        and isinstance(value["city"], str)
        and len(value["city"]) <= 3
        and value.get("days", 1) in (1, 2)
    )


@pytest.mark.parametrize(("dialect", "start", "control"), DIALECTS)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_must_come_comes(
    dialect: str, start: str, control: Any, parallel: bool
) -> None:
    made = form(dialect, start, control, choice="required", parallel=parallel)
    constraint = made.constraint(None)
    assert constraint is not None
    most = 0
    for seed in range(20):
        reply = made.parsed(walk(constraint, control, seed))
        assert reply.tool_calls
        for call in reply.tool_calls:
            assert call.complete
            assert not call.repaired
            assert valid(call.name, call.arguments)
        most = max(most, len(reply.tool_calls))
    assert (most > 1) is (parallel and dialect != "react")


@pytest.mark.parametrize(("dialect", "start", "control"), DIALECTS)
def test_a_named_call_is_that_one(dialect: str, start: str, control: Any) -> None:
    if dialect == "qwen_fn" and not start:
        start = "✿FUNCTION✿: get_time"
    made = form(dialect, start, control, choice="get_time", parallel=False)
    constraint = made.constraint(None)
    assert constraint is not None
    for seed in range(4):
        (call,) = made.parsed(walk(constraint, control, seed)).tool_calls
        assert (call.name, call.arguments.split()) == ("get_time", call.arguments.split())
        assert json.loads(call.arguments) == {}


FREE = {
    "hermes": ("Well <tool_", 'Well.\n<tool_call>\n{"name": "get_time", "arguments": {'),
    "qwen_fn": ("Well ✿FUNCT", "Well.\n✿FUNCTION✿: get_time\n✿ARGS✿: {"),
    "qwen_xml": ("Well <tool_", "Well.\n<tool_call>\n<function=get_time>\n"),
    "react": ("Thought: a\nFinal Answer: 7", "Thought: a\nAction: get_time\nAction Input: {"),
}


@pytest.mark.parametrize(("dialect", "start", "control"), DIALECTS)
def test_text_may_come_instead(dialect: str, start: str, control: Any) -> None:
    made = form(dialect, start, control)
    constraint = made.constraint(None)
    assert constraint is not None
    text, calling = FREE[dialect]
    assert not made.parsed(walk(constraint, control, 0, text)).tool_calls
    for seed in range(4):
        reply = made.parsed(walk(constraint, control, seed, calling))
        assert all(valid(call.name, call.arguments) for call in reply.tool_calls)
        assert reply.tool_calls


def test_xml_of_any_parameters() -> None:
    loose = ReplyFormat(
        dialect=find("qwen_xml"),
        tools=(
            Tool("f", "", {}),
            Tool("g", "", {"properties": {"n": {}, "o": {"type": "object"}}}),
        ),
        options=ToolOptions(choice="required", parallel=False),
    )
    constraint = loose.constraint(None)
    assert constraint is not None
    for first, arguments in (
        ("f>\n<parameter=x>\na\n</b>\n</parameter>\n</function>", {"x": "a\n</b>"}),
        ('g>\n<parameter=o>\n{"a": 1}\n</parameter>\n</function>', {"o": {"a": 1}}),
        ("g>\n</function>", {}),
    ):
        text = walk(constraint, PLAIN, 0, f"<tool_call>\n<function={first}")
        (call,) = loose.parsed(text).tool_calls
        assert json.loads(call.arguments) == arguments
    strict = replace(loose, options=replace(loose.options, constrained=True), tools=loose.tools[1:])
    constraint = strict.constraint(None)
    assert constraint is not None
    text = "<tool_call>\n<function=g>\n<parameter=n>\n</a>\n</parameter>\n<parameter=o>\n{"
    for seed in range(4):
        (call,) = strict.parsed(walk(constraint, PLAIN, seed, text)).tool_calls
        assert json.loads(call.arguments)["n"] == "</a>"
        assert isinstance(json.loads(call.arguments)["o"], dict)


def test_nothing_is_asked_of_free_calls() -> None:
    loose = ReplyFormat(dialect=find("hermes"), tools=(Tool("f", "", {}),))
    assert loose.constraint(None) is None
    none = ReplyFormat(dialect=find("hermes"), options=ToolOptions(choice="none"))
    assert none.constraint(None) is None
    asked = Constraint(regex="a/b")
    assert none.constraint(asked) is asked


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (Constraint(json_schema={"const": {"a": 1}}), '{"a":1}'),
        (Constraint(choice=["yes", 'n"o']), 'n"o'),
        (Constraint(regex=r"[a-c]/\/[\]/]\d"), "b//]7"),
    ],
)
def test_an_answer_or_a_call(asked: Constraint, answer: str) -> None:
    made = form("hermes", "", CONTROL)
    constraint = made.constraint(asked)
    assert constraint is not None
    assert made.parsed(walk(constraint, CONTROL, 0, answer)).content == answer
    text = walk(constraint, CONTROL, 0, '<tool_call>\n{"name": "get_time"')
    assert [call.name for call in made.parsed(text).tool_calls][:1] == ["get_time"]


def test_what_does_not_go_together_is_refused() -> None:
    made = form("hermes", "", CONTROL, choice="required")
    with pytest.raises(RequestError, match=r"constraint.regex: is given beside"):
        made.constraint(Constraint(regex="a"))
    with pytest.raises(RequestError, match=r"constraint.grammar: does not go together"):
        form("hermes", "", CONTROL).constraint(Constraint(grammar='start: "a"'))
    silent = ReplyFormat(
        dialect=find("template"), tools=TOOLS, options=ToolOptions(choice="required")
    )
    with pytest.raises(RequestError, match="'template' cannot make"):
        silent.constraint(None)
    with pytest.raises(RequestError, match=r"tools: we.ather.city: maxLength cannot be held"):
        ReplyFormat(dialect=find("qwen_xml"), tools=TOOLS).constraint(None)
    big = Tool("f", "", {"enum": ["x" * 70_000]}, strict=True)
    with pytest.raises(RequestError, match="tools: the grammar of their calls has"):
        ReplyFormat(dialect=find("hermes"), tools=(big,)).constraint(None)


@pytest.mark.parametrize("control", [PLAIN, CONTROL])
@pytest.mark.parametrize("asked", [None, Constraint(json_schema={"const": 1})])
def test_thoughts_come_before(control: Any, asked: Constraint | None) -> None:
    choice = "required" if asked is None else "auto"
    for start, first in (
        ("", "<think>\nHm</think>\n\n"),
        ("<think>\n", "Hm</think>\n\n"),
        ("", ""),
    ):
        made = form("hermes", start, control, thinks=True, choice=choice)
        constraint = made.constraint(asked)
        assert constraint is not None
        reply = made.parsed(walk(constraint, control, 1, first))
        assert reply.reasoning == ("Hm" if first else None)
        assert reply.tool_calls or reply.content == "1"
    closed = form("hermes", "<think>\n\n</think>\n\n", control, thinks=True, choice=choice)
    constraint = closed.constraint(asked)
    assert constraint is not None
    assert closed.parsed(walk(constraint, control, 1)).reasoning is None


def test_names_of_tokens_are_allowed_only_where_a_grammar_has_them() -> None:
    tokenizer = ControlBytes(CONTROL)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    for kind in ({"json_schema": {"type": "string"}}, {"regex": "(?s:.*)"}):
        matcher = grammars.matcher(Constraint(**kind), [END])
        matcher.consume(ord('"'))
        assert set(numpy.flatnonzero(matcher.mask()[256:])) <= {END - 256}
    named = grammars.matcher(Constraint(grammar="start: <tool_call> /a*/"), [END])
    assert numpy.flatnonzero(named.mask()).tolist() == [tokenizer.control_tokens["<tool_call>"]]
    with pytest.raises(RequestError, match="no token of the vocabulary"):
        grammars.matcher(Constraint(grammar="start: <|fim_pad|>"), [END])
