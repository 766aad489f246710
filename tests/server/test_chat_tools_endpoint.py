"""Tool calls over /v1/chat/completions: streamed as written, the same as whole, in both APIs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import Client, asked, data_of

from scripted_server import script_of, scripted

ASK = [{"role": "user", "content": "weather in Paris and Rome?"}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
ONE = 'I look.\n✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Paris"}'
TWO = f'{ONE}\n✿FUNCTION✿: weather\n✿ARGS✿: {{"city": "Rome"}}\n✿RESULT✿: never'
SCRIPT = script_of([["20 degrees", "It is sunny."], ["", TWO]])


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message that a client puts together of a stream's deltas."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] not in calls
                calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
                assert call["function"]["arguments"] == ""
            else:
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
        if "function_call" in delta:
            old = message.setdefault("function_call", {"name": "", "arguments": ""})
            for key, value in delta["function_call"].items():
                old[key] += value
    return message | ({"calls": list(calls.values())} if calls else {})


def test_calls_are_streamed_and_told_whole(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, SCRIPT):
            whole = (await client.chat(ASK, tools=TOOLS, max_tokens=300)).json()["choices"][0]
            text = (await client.chat(ASK, tools=TOOLS, max_tokens=300, stream=True)).text
        chunks = data_of(text)[:-1]
        calls = [call["function"] for call in whole["message"]["tool_calls"]]
        assert calls == [
            {"name": "weather", "arguments": '{"city": "Paris"}'},
            {"name": "weather", "arguments": '{"city": "Rome"}'},
        ]
        assert whole["finish_reason"] == "tool_calls"
        streamed = joined(chunks)
        assert streamed["calls"] == calls
        assert streamed["content"] == whole["message"]["content"] == "I look."
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        ids = [call["id"] for call in whole["message"]["tool_calls"]]
        assert all(name.startswith("call_") for name in ids)
        assert len(set(ids)) == 2

    asked(tiny, use)


def test_a_conversation_with_results_goes_on(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, SCRIPT):
            first = (await client.chat(ASK, tools=TOOLS, max_tokens=300)).json()["choices"][0]
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": "20 degrees"}
                for call in first["message"]["tool_calls"]
            ]
            messages = [*ASK, first["message"], *results]
            second = (await client.chat(messages, tools=TOOLS, max_tokens=300)).json()
        assert second["choices"][0]["message"]["content"] == "It is sunny."
        assert second["choices"][0]["finish_reason"] == "stop"

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_the_old_functions(tiny: Path, stream: bool) -> None:
    script = script_of([["20 degrees", "It is sunny."], ["", f"{ONE}\n✿RESULT✿: never"]])

    async def use(client: Client) -> None:
        with scripted(client.served.llm, script):
            answer = await client.chat(ASK, functions=[WEATHER], max_tokens=300, stream=stream)
            if stream:
                chunks = data_of(answer.text)[:-1]
                message, reason = joined(chunks), chunks[-1]["choices"][0]["finish_reason"]
            else:
                choice = answer.json()["choices"][0]
                message, reason = choice["message"], choice["finish_reason"]
            call = {"name": "weather", "arguments": '{"city": "Paris"}'}
            assert (message["function_call"], reason) == (call, "function_call")
            assert message["content"] == "I look."
            result = {"role": "function", "name": "weather", "content": "20 degrees"}
            told = {"role": "assistant", "content": "I look.", "function_call": call}
            second = await client.chat([*ASK, told, result], functions=[WEATHER], max_tokens=99)
            assert second.json()["choices"][0]["message"]["content"] == "It is sunny."

    asked(tiny, use)


def test_choices_of_tools(tiny: Path) -> None:
    async def use(client: Client) -> None:
        seen: list[str] = []

        def script(prompt: str) -> str:
            seen.append(prompt)
            return TWO

        with scripted(client.served.llm, script):
            fields: list[tuple[dict[str, Any], int]] = [
                ({"parallel_tool_calls": False}, 1),
                ({"parallel_tool_calls": True}, 2),
                ({"tool_choice": "auto"}, 2),
                ({"tool_choice": "none"}, 0),
            ]
            for more, count in fields:
                answer = await client.chat(ASK, tools=TOOLS, max_tokens=300, **more)
                message = answer.json()["choices"][0]["message"]
                assert len(message.get("tool_calls", ())) == count, more
            answer = await client.chat(ASK, max_tokens=300)  # no tools: it is all text
            message = answer.json()["choices"][0]["message"]
            assert message == {"role": "assistant", "content": TWO, "refusal": None}
        assert ["Tells the weather." in prompt for prompt in seen] == [True] * 3 + [False] * 2

    asked(tiny, use)


def test_qwens_own_ways_to_define_a_function(tiny: Path) -> None:
    qwen = {
        "name_for_human": "天气",
        "name_for_model": "weather",
        "description_for_model": "查天气",
        "parameters": [
            {"name": "city", "description": "城市", "required": True, "schema": {"type": "string"}}
        ],
    }
    listed = {**WEATHER, "parameters": [{"name": "city", "type": "string", "required": True}]}

    async def use(client: Client) -> None:
        with scripted(client.served.llm, SCRIPT):
            old = await client.chat(ASK, functions=[qwen], max_tokens=300)
            assert old.json()["choices"][0]["message"]["function_call"]["name"] == "weather"
            tool = {"type": "function", "function": listed}
            new = await client.chat(ASK, tools=[tool], max_tokens=300)
            assert len(new.json()["choices"][0]["message"]["tool_calls"]) == 2

    asked(tiny, use)


def test_a_call_that_is_cut_off_ends_with_length(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, script_of([["", ONE]])):
            size = len(ONE.encode()) - 4
            answer = await client.chat(ASK, tools=TOOLS, max_tokens=size)
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        with pytest.raises(json.JSONDecodeError):
            json.loads(call["function"]["arguments"])

    asked(tiny, use)
