"""Messages and tools, read from what users write."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.errors import RequestError
from qwenkit.types.messages import Message, Tool, ToolCall, parse_messages, parse_tools

CALL = {"name": "f", "arguments": '{"a": 1}'}


def test_calls_of_both_shapes() -> None:
    now = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]}
    before = {"role": "assistant", "content": "x", "function_call": CALL}
    assert parse_messages([now, before]) == (
        Message("assistant", "", tool_calls=(ToolCall("f", '{"a": 1}', "1"),)),
        Message("assistant", "x", tool_calls=(ToolCall("f", '{"a": 1}'),)),
    )
    absent = {"role": "assistant", "content": "x", "function_call": None, "tool_calls": None}
    assert parse_messages([absent]) == (Message("assistant", "x"),)
    as_object = {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": "é"}}}
    assert parse_messages([as_object])[0].tool_calls == (ToolCall("f", '{"a": "é"}'),)


def test_a_result_of_both_names() -> None:
    result = Message("tool", "r", name="f")
    for role in ("tool", "function"):
        assert parse_messages([{"role": role, "name": "f", "content": "r"}]) == (result,)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (
            {"role": "user", "content": "q", "function_call": CALL},
            r"messages\[0\].role: got 'user'",
        ),
        ({"role": "assistant", "function_call": {}}, r"messages\[0\].function_call: expected"),
        ({"role": "boss", "content": ""}, r"messages\[0\].role: got 'boss'; allowed: system"),
        ({"role": "user", "content": "", "tool_call": 1}, r"messages\[0\].tool_call: unknown key"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(message: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        parse_messages([message])


def test_a_tool_as_the_first_generation_has_it() -> None:
    parameters = [
        {"name": "q", "description": "What.", "required": True, "schema": {"type": "string"}},
        {"name": "n"},
    ]
    given = {
        "name_for_human": "搜索",
        "name_for_model": "search",
        "description_for_model": "Searches.",
        "parameters": parameters,
        "args_format": "json",
    }
    schema = {
        "type": "object",
        "properties": {"q": {"description": "What.", "type": "string"}, "n": {}},
        "required": ["q"],
    }
    assert parse_tools([given]) == (
        Tool("search", "Searches.", schema, "搜索", parameters, args_format="json"),
    )


def test_tools_of_openai() -> None:
    function = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    expected = Tool("f", "", {"type": "object"}, strict=True)
    for given in ({"type": "function", "function": function}, function, expected):
        assert parse_tools([given]) == (expected,)
    with pytest.raises(RequestError, match=r"tools\[1\]: there is another tool of the name 'f'"):
        parse_tools([function, expected])
    assert parse_tools([{"name": "f"}]) == (Tool("f", "", {}),)
    for wrong, message in (
        ({}, r"tools\[0\]: expected"),
        ({"name": ""}, r"tools\[0\]: expected"),
        ({"name": "f", "parameters": [1]}, "must be a JSON schema"),
        ({"name": "f", "args_format": 1}, r"tools\[0\].args_format: expected text"),
    ):
        with pytest.raises(RequestError, match=message):
            parse_tools([wrong])
