"""What is sent: the raw history, only the settings that are given, each within its range."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall
from qwenkit.web.conversation import Conversation, Turn
from qwenkit.web.reply import CallPiece, Piece, Reply, Usage
from qwenkit.web.request import SETTINGS, build, messages, read_settings

RAW = "<b>1 < 2 &amp;</b> **x** $y$ `z`\r\n\t\\(a\\)"


def request(**settings: Any) -> dict[str, Any]:
    conversation = Conversation(id="a", turns=(Turn(role="user", text="hi"),))
    return build(conversation, model="m", settings=settings)


def test_history_is_sent_as_it_was_said() -> None:
    call = ToolCall("f", '{"a": "<b>"}', id="call-1")
    turns = (
        Turn(role="user", text=RAW),
        Turn(role="assistant", text=RAW, reasoning="thought", calls=(call,), ended="tool_calls"),
        Turn(role="tool", text=RAW, call_id="call-1"),
        Turn(role="assistant", text="", ended="error", error="gone"),
        Turn(role="user", text="more"),
    )
    function = {"name": "f", "arguments": '{"a": "<b>"}'}
    assert messages(Conversation(id="a", system=RAW, turns=turns)) == [
        {"role": "system", "content": RAW},
        {"role": "user", "content": RAW},
        {
            "role": "assistant",
            "content": RAW,
            "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": RAW, "tool_call_id": "call-1"},
        {"role": "user", "content": "more"},
    ]


def test_what_is_empty_is_not_sent() -> None:
    empty = {setting.name: None for setting in SETTINGS} | {"stop": "", "tools": " "}
    assert request(**empty) == request()
    assert set(request()) == {"model", "messages", "stream", "stream_options"}


def test_every_setting_is_sent_where_its_server_looks_for_it() -> None:
    sent = request(
        temperature=0,
        top_p=0.5,
        max_tokens=7.0,
        seed=3,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=1,
    )
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0, 0.5, 7, 3)
    assert (sent["presence_penalty"], sent["frequency_penalty"]) == (-1, 1)
    assert sent["extra_body"] == {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert type(sent["max_tokens"]) is int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", -1),
        ("top_k", "many"),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        request(**{name: value})


def test_stop_texts_are_lines_with_escapes() -> None:
    assert request(stop="\\n\nUser:\n\n a\\\\n \\x\\")["stop"] == ["\n", "User:", " a\\n \\x\\"]


def test_tools_are_given_as_the_api_takes_them() -> None:
    schema = '{"type": "object"}'
    short = f'[{{"name": "f", "parameters": {schema}}}]'
    full = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    assert request(tools=short) == request(tools=full)
    assert request(tools=full)["tools"][0]["function"]["name"] == "f"
    for wrong in ("{", "{}", '[{"name": 3}]', "[" * 99_999):
        with pytest.raises(UsageError, match="tools"):
            request(tools=wrong)


def test_only_settings_are_read_from_the_page() -> None:
    assert read_settings({"seed": 1, "stop": "a\ud800", "other": 2}) == {
        "seed": 1,
        "stop": "a\ufffd",
    }


def test_a_reply_is_the_sum_of_its_pieces() -> None:
    reply = Reply(model="asked", started_s=10.0)
    assert reply.turn().stats is not None
    assert reply.turn().stats.first_s is None  # type: ignore[union-attr]
    pieces = [
        Piece(model="told"),
        Piece(reasoning="Hm."),
        Piece(text="Hel"),
        Piece(text="lo"),
        Piece(calls=(CallPiece(1, name="g", arguments="{"), CallPiece(0, id="x", name="f"))),
        Piece(calls=(CallPiece(1, arguments="}"),)),
        Piece(finish="tool_calls"),
        Piece(usage=Usage(5, 7, 3)),
    ]
    for second, piece in enumerate(pieces):
        reply.add(piece, 10.0 + second)
    turn = reply.turn()
    assert (turn.text, turn.reasoning, turn.model, turn.ended) == (
        "Hello",
        "Hm.",
        "told",
        "tool_calls",
    )
    assert turn.calls == (ToolCall("f", "", id="x"), ToolCall("g", "{}", id="call_1"))
    stats = turn.stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens) == (5, 7, 3)
    assert (stats.first_s, stats.total_s, stats.pieces) == (1.0, 5.0, 5)


def test_stopping_and_failing() -> None:
    reply = Reply(model="m", started_s=0.0)
    reply.add(Piece(text="so far"), 1.0)
    reply.stop()
    assert (reply.turn().text, reply.turn().ended) == ("so far", "stopped")
    ended = Reply(model="m", started_s=0.0)
    ended.add(Piece(finish="stop"), 1.0)
    ended.stop()
    assert ended.turn().ended == "stop"
    ended.fail("gone")
    assert (ended.turn().ended, ended.turn().error) == ("error", "gone")
