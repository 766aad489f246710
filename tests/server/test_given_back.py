"""What client libraries give back of a reply, and add of their own, is taken."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.server.conversation import library_messages
from qwenkit.server.errors import ApiError
from qwenkit.server.wire.base import read
from qwenkit.server.wire.chat import ChatRequest

QUESTION = {"role": "user", "content": "What is the weather in Paris?"}


def messages_of(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return library_messages(read(ChatRequest, {"messages": [QUESTION, *given]}).messages)


def call(**more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}', **more}
    return {"id": "call_1", "type": "function", "function": function}


def test_a_reply_that_the_openai_client_parsed() -> None:
    reply = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "parsed": None,
        "tool_calls": [call(parsed_arguments={"city": "Paris"})],
    }
    assert messages_of(reply)[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call()],
    }


def test_a_result_as_qwen_agent_gives_it() -> None:
    asked = {"role": "assistant", "tool_calls": [call()]}
    told = {
        "role": "tool",
        "content": "Sunny",
        "name": "get_weather",
        "id": "call_1",
        "extra": {"function_id": "call_1"},
    }
    assert messages_of(asked, told)[2] == {
        "role": "tool",
        "content": "Sunny",
        "name": "get_weather",
        "tool_call_id": "call_1",
    }
    assert messages_of(asked, told | {"tool_call_id": "call_2"})[2]["tool_call_id"] == "call_2"


def test_a_schema_goes_by_its_name_outside() -> None:
    schema = {"name": "city", "schema": {"type": "object"}, "strict": True}
    fields = {"response_format": {"type": "json_schema", "json_schema": schema}}
    taken = read(ChatRequest, {"messages": [QUESTION], **fields}).response_format
    assert taken is not None
    assert taken.model_dump(by_alias=True)["json_schema"]["schema"] == {"type": "object"}
    schema["schema_"] = schema.pop("schema")
    with pytest.raises(ApiError, match=r"schema_: unknown field. Did you mean 'schema'"):
        read(ChatRequest, {"messages": [QUESTION], **fields})
