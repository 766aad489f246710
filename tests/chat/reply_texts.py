"""Replies as models write them, well and badly, from seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from qwenkit.chat.dialects.spec import Conversation, dialects, find
from qwenkit.chat.parse import ReplyCollector
from qwenkit.chat.replies import ReplyFormat
from qwenkit.types.completion import Reply, ReplyCall
from qwenkit.types.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
)
from qwenkit.types.messages import Message, Tool, ToolCall

WORDS = (
    *(
        "city",
        "Paris",
        "北京",
        "a b",
        "",
        "it's",
        'say "hi"',
        "a\\b",
        "x\ny",
        "\t",
        "𝄞",
        "é",
        "}",
        "{",
    ),
    *("</tool_call>", "<tool_call>", "✿FUNCTION✿: f", "✿ARGS✿: ", "\nAction: f", "\nObservation:"),
    *("</think>", "```", "// no", "null", "1e3", "</parameter>", "<function=f>"),
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
TOOLS = (
    Tool("get_weather", "", SCHEMA | {"required": ["city"]}),
    Tool("run_code", "", {"properties": {"code": {"type": "string"}}, "required": ["code"]}),
    Tool("now", "", {}),
)
NONSENSE = (
    *(
        '"',
        "'",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\\",
        "\n",
        " ",
        "`",
        "<",
        ">",
        "✿",
        "\x00",
        "\u2028",
    ),
    *("<tool_call>", "</tool_call>", "✿FUNCTION✿:", "✿ARGS✿:", "✿RESULT✿", "\nAction:"),
    *("\nAction Input:", "\nFinal Answer:", "Thought:", "<think>", "</think>", "\nObservation:"),
    *('{"name": "now", "arguments": {}}', "```json\n", "\n```", "True", "//", "/*", "\\u12", '"""'),
    *("<function=now>", "<parameter=city>", "</parameter>", "</function>", "{" * 200, "\ufeff"),
)
DIALECTS = sorted(name for name, dialect in dialects().items() if dialect.calls)
Call = tuple[str, dict[str, Any]]


def form(dialect: str, *, parallel: bool = True) -> ReplyFormat:
    """The format of replies to `TOOLS`."""
    return ReplyFormat(dialect=find(dialect), tools=TOOLS, thinks=dialect == "hermes")


def some_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind < 3:
        return "".join(draw.choices(WORDS, k=draw.randrange(3)))
    if kind < 6:
        return draw.choice([0, -1, 2.5, 1e30, True, False, None, 12345])
    if kind == 6:
        return [some_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(WORDS): some_value(draw, depth + 1) for _ in range(draw.randrange(3))}


def some_call(draw: random.Random) -> Call:
    name = draw.choice(TOOLS).name
    arguments = {"city": "".join(draw.choices(WORDS, k=2))} if name == "get_weather" else {}
    if name == "run_code":
        arguments = {"code": some_value(draw)}
    if draw.random() < 0.5:
        arguments[draw.choice(WORDS)] = some_value(draw)
    return name, arguments


def dumped(draw: random.Random, value: Any) -> str:
    return json.dumps(value, ensure_ascii=draw.random() < 0.3, indent=draw.choice([None, None, 1]))


def kept(dialect: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What of arguments a dialect can write: XML has no names with brackets in them, no value with
    its own end in it, and keeps the types only of what the schema knows.
    """
    if dialect != "qwen_xml":
        return arguments
    return {
        key: value
        for key, value in arguments.items()
        if key in ("city", "code") and isinstance(value, str) and "</parameter>" not in value
    }


def some_turn(dialect: str | None, draw: random.Random, *, usual: bool = False) -> Message:
    """An assistant's turn with a few calls or none; with `usual` their JSON as Python writes it,
    as it also is where a template or a dialect writes it anew.
    """
    said = draw.choice(["", "", "Let me see.", "好的。\n\nOne, two."])
    usual = usual or dialect == "qwen_xml"
    calls = []
    for _ in range(draw.randrange(2 if dialect == "react" else 4)):
        name, arguments = some_call(draw)
        arguments = kept(dialect, arguments)
        text = json.dumps(arguments, ensure_ascii=False) if usual else dumped(draw, arguments)
        calls.append(ToolCall(name, text))
    return Message("assistant", said, tool_calls=tuple(calls))


def written(dialect: str, draw: random.Random) -> tuple[str, Message]:
    """A well-formed reply as its text, and what it is."""
    turn = some_turn(dialect, draw)
    given = Conversation(messages=(Message("user", "q"), turn), tools=TOOLS)
    text = find(dialect).write(given).messages[-1].content
    if dialect == "hermes" and draw.random() < 0.3:
        text = f"<think>\nHm.\n</think>\n\n{text}"
    return text, turn


def check_turn(reply: Reply, turn: Message) -> None:
    """What was read is what was written."""
    assert reply.tool_calls == tuple(ReplyCall(c.name, c.arguments) for c in turn.tool_calls)
    assert reply.content.strip() == turn.content


def broken(dialect: str, draw: random.Random) -> str:
    """A reply that had one to four accidents."""
    text = written(dialect, draw)[0]
    for _ in range(draw.randrange(1, 5)):
        at, to = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
        kind = draw.randrange(7)
        if kind == 0:
            text = text[:at]
        elif kind == 1:
            text = text[:at] + text[at + draw.randrange(1, 4) :]
        elif kind == 2 and to - at < 60:
            text = text[:to] + text[at:to] + text[to:]
        elif kind == 3:
            text = text.replace('"', draw.choice(["'", "“", ""]), draw.choice([-1, 1, 3]))
        elif kind == 4:
            text = text[:at] + text[at : at + 9].swapcase() + text[at + 9 :]
        else:
            text = text[:at] + draw.choice(NONSENSE) + text[at:]
    return text


def deltas_of(
    made: ReplyFormat, pieces: Sequence[str], *, complete: bool = True
) -> list[ReplyDelta]:
    parser = made.parser()
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return [*deltas, *parser.end(complete=complete)]


def joined(deltas: Sequence[ReplyDelta]) -> list[ReplyDelta]:
    """The same with neighbours of one kind put together."""
    result: list[ReplyDelta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.index, last.text + delta.text)
        elif isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            result[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            result[-1] = ReasoningDelta(last.text + delta.text)
        else:
            result.append(delta)
    return result


def reply_of(deltas: Sequence[ReplyDelta]) -> Reply:
    collector = ReplyCollector()
    collector.add(deltas)
    return collector.reply()


def check(text: str, deltas: Sequence[ReplyDelta]) -> None:
    """What must hold for every reply, whatever it looks like."""
    index, is_open = -1, False
    arguments = ""
    for delta in deltas:
        if isinstance(delta, CallStart):
            index, is_open, arguments = index + 1, True, ""
            assert delta.index == index
            assert delta.name
        elif isinstance(delta, CallArguments):
            assert (is_open, delta.index) == (True, index)
            assert delta.text
            arguments += delta.text
        elif isinstance(delta, CallEnd):
            assert (is_open, delta.index) == (True, index)
            assert delta.arguments == arguments
            assert isinstance(json.loads(arguments), dict)
            is_open = False
        else:
            assert delta.text
    if index < 0 and not any(isinstance(delta, ReasoningDelta) for delta in deltas):
        content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
        assert content == text or text.lstrip().startswith(("<think>", "Thought:")), (text, content)
