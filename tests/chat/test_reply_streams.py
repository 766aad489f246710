"""Streamed equals unstreamed, for replies of every dialect, well-formed and broken (row 16 of the
reliability scoreboard).
"""

from __future__ import annotations

import random
import time

import pytest
from reply_texts import (
    DIALECTS,
    broken,
    check,
    check_turn,
    deltas_of,
    form,
    joined,
    reply_of,
    written,
)

from qwenkit.chat.json_repair import repair_arguments, repair_object
from qwenkit.chat.json_scan import JsonScan, is_object
from qwenkit.chat.replies import ReplyFormat


def streamed_equals_unstreamed(dialect: str, text: str, splits: list[int]) -> None:
    made = form(dialect)
    for complete in (True, False):
        whole = joined(deltas_of(made, [text], complete=complete))
        check(text, whole)
        assert joined(deltas_of(made, list(text), complete=complete)) == whole, text
        for at in splits:
            parts = [text[:at], text[at:]]
            assert joined(deltas_of(made, parts, complete=complete)) == whole, (text, at)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_well_formed_replies_come_whole(dialect: str) -> None:
    for seed in range(150):
        draw = random.Random(f"{dialect} {seed}")
        text, turn = written(dialect, draw)
        streamed_equals_unstreamed(dialect, text, [draw.randrange(len(text) + 1)])
        check_turn(reply_of(deltas_of(form(dialect), [text])), turn)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_broken_replies_do_not_depend_on_pieces(dialect: str) -> None:
    for seed in range(400):
        draw = random.Random(f"{dialect} {seed}")
        text = broken(dialect, draw)
        streamed_equals_unstreamed(dialect, text, [draw.randrange(len(text) + 1) for _ in range(4)])


@pytest.mark.oracle
@pytest.mark.parametrize("dialect", DIALECTS)
def test_five_thousand_at_every_split(dialect: str) -> None:
    for seed in range(5_000 // len(DIALECTS)):  # of each: together five thousand
        draw = random.Random(f"all {dialect} {seed}")
        text = broken(dialect, draw) if seed % 5 else written(dialect, draw)[0]
        made = form(dialect)
        whole = joined(deltas_of(made, [text]))
        check(text, whole)
        for at in range(len(text) + 1):
            assert joined(deltas_of(made, [text[:at], text[at:]])) == whole, (text, at)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_repairs_go_on_from_what_was_given_out(dialect: str) -> None:
    for seed in range(1_000):
        text = broken(dialect, random.Random(f"{dialect} {seed}"))
        source = text[text.find("{") :] if "{" in text else "{}"
        scan = JsonScan()
        taken = scan.feed(source)
        pieces = JsonScan()
        for character in source[: taken + 1]:
            pieces.feed(character)
        assert (pieces.certain, pieces.complete) == (scan.certain, scan.complete)
        repaired = repair_object(source)
        if repaired is not None:
            assert repaired.text.startswith(source[: scan.certain])
            assert is_object(repaired.text)
            assert not scan.complete or repaired.text == source[:taken]
        arguments = repair_arguments(source, {})
        assert arguments is None or is_object(arguments)


LONG = {
    "hermes": (
        '<tool_call>\n{"name": "run_code", "arguments": {"code": "' + "</tool_call> x\\n" * 800,
        "<tool_call>" * 480,
        '<tool_call>{"a":"' * 800,
        '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>' * 240,
        '<tool_call>{"name": "now", "arguments": {"a": 1' + " " * 12_000,
        '<tool_call>{"name": "now", "arguments": {"a": [' + "1," * 6_000,
        '<tool_call>{"name": "now", "arguments": {"a": 1' + "0" * 12_000,
        "<" * 12_000,
        "\n" * 12_000,
        "<think>" + "\n" * 12_000,
        '<tool_call>{"name": "now", "arguments": {' + '"' * 12_000,
        "<tool_call>{'a': " + "'\"" * 6_000,
        "<tool_call>{'a': [" + "a /**/ " * 2_000,
        "<tool_call>{'a': [" + ", " * 4_000,
    ),
    "qwen_fn": (
        "✿FUNCTION✿: now\n✿ARGS✿: {}\n" * 480,
        "✿FUNCTION✿:" * 480,
        "✿FUNCTION✿: now\n✿ARGS✿: " + "✿" * 12_000,
        "✿FUNCTION✿: now\n✿ARGS✿: " + "// x\n" * 2_400,
        '✿FUNCTION✿: now\n✿ARGS✿: {"a": "' + "✿ARGS✿: {" * 480,
    ),
    "qwen_xml": (
        "<tool_call><function=now><parameter=a>\n</function>" * 480,
        "<function=now><parameter=a>" + "\n</function>" * 800,
        "<tool_call><function=run_code><parameter=code>" + '\n"é' * 4_000,
        "<function=" * 800,
        "<function=now>" + "\n" * 12_000 + "<parameter=a>1",
        "<function=get_weather><parameter=n>" + "[" * 12_000,
    ),
    "react": (
        "Thought: a\n" * 480,
        "\nAction: now\nAction Input:" * 480,
        "\nAction:" * 480,
        'Action: now\nAction Input: {"a": [' + "[" * 12_000,
        "Thought:" + "x" * 12_000,
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_time_is_linear(dialect: str) -> None:
    for text in LONG.get(dialect, LONG["hermes"]):
        for size in (1, len(text)):
            assert any(_is_linear(form(dialect), text, size) for _ in range(5)), (text[:60], size)


def _is_linear(made: ReplyFormat, text: str, size: int) -> bool:
    """Ten times the text takes at most fifteen times as long; other work on the machine may make
    one measurement wrong.
    """
    short = min(_seconds(made, text[: len(text) // 10], size) for _ in range(3))
    return _seconds(made, text, size) <= 15 * short


def _seconds(made: ReplyFormat, text: str, size: int) -> float:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    start = time.thread_time()
    deltas_of(made, pieces)
    return time.thread_time() - start


@pytest.mark.parametrize("dialect", DIALECTS)
def test_text_comes_at_once(dialect: str) -> None:
    """Nothing is held back but what may become a mark, or white space in front of a call."""
    parser = form(dialect).parser()
    text, given = "Hello, how are you? I am < fine ✿ thanks.\nA", ""
    for count, character in enumerate(text, 1):
        given += "".join(delta.text for delta in parser.push(character))  # type: ignore[union-attr]
        assert len(text[:count].rstrip()) - len(given) <= 4, (given, text[:count])


def test_arguments_come_at_once() -> None:
    parser, given = form("hermes").parser(), ""
    body = '{"city": "Paris is a city", "n": [1, 2]}'
    parser.push('<tool_call>\n{"name": "get_weather", "arguments": ')
    for count, character in enumerate(body, 1):
        for delta in parser.push(character):
            given += getattr(delta, "text", "")
        assert count - len(given) <= 2, (given, body[:count])
