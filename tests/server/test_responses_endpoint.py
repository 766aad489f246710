"""/v1/responses: items, and the numbered events that tell of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import Client, asked

from qwenkit.server.response_items import Output
from qwenkit.types.deltas import CallArguments, CallEnd, CallStart, ContentDelta, ReasoningDelta
from scripted_server import script_of, scripted

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = 'I look.\n✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Paris"}\n✿RESULT✿: never'
SCRIPT = script_of([["20 degrees", "It is sunny."], ["weather in", CALL], ["", "Hi."]])


def parsed(text: str) -> list[dict[str, Any]]:
    import json

    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        head, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert head == f"event: {value['type']}"
        events.append(value)
    return events


def test_the_whole_answer(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, SCRIPT):
            body = {"input": "Hello", "instructions": "Be brief.", "metadata": {"a": "b"}}
            answer = (await client.post("/v1/responses", body)).json()
            cut = (await client.post("/v1/responses", body | {"max_output_tokens": 2})).json()
        (item,) = answer["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        text = {"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}
        assert item["content"] == [text]
        assert (answer["status"], answer["incomplete_details"]) == ("completed", None)
        assert (answer["store"], answer["metadata"]) == (False, {"a": "b"})
        assert answer["usage"]["output_tokens"] == 4
        assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 4
        assert answer["id"].startswith("resp_")
        assert cut["status"] == cut["output"][0]["status"] == "incomplete"
        assert cut["incomplete_details"] == {"reason": "max_output_tokens"}

    asked(tiny, use)


def test_a_stream_tells_of_text_and_calls(tiny: Path) -> None:
    async def use(client: Client) -> None:
        body = {"input": "weather in Paris?", "tools": [WEATHER]}
        with scripted(client.served.llm, SCRIPT):
            whole = (await client.post("/v1/responses", body)).json()
            events = parsed((await client.post("/v1/responses", {**body, "stream": True})).text)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"].removeprefix("response.") for event in events]
        once = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
        assert once == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done", "completed"),
        ]
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == "I look."
        arguments = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
        assert "".join(arguments) == '{"city": "Paris"}'
        last = events[-1]["response"]
        assert [blank(item) for item in last["output"]] == [blank(i) for i in whole["output"]]
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert done == last["output"]
        assert last["usage"] == whole["usage"] | {
            "input_tokens_details": last["usage"]["input_tokens_details"]
        }
        assert events[0]["response"]["output"] == []

    asked(tiny, use)


def blank(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_what_was_answered_can_be_given_back(tiny: Path) -> None:
    async def use(client: Client) -> None:
        body = {"input": "weather in Paris?", "tools": [WEATHER]}
        with scripted(client.served.llm, SCRIPT):
            first = (await client.post("/v1/responses", body)).json()
            call = first["output"][1]
            result = {"type": "function_call_output", "call_id": call["call_id"]}
            thought = {"type": "reasoning", "id": "rs_1", "summary": []}
            items = [
                {"role": "user", "content": [{"type": "input_text", "text": "weather in Paris?"}]},
                *first["output"][:1],
                thought,
                call,
                {**result, "output": "20 degrees"},
            ]
            second = await client.post("/v1/responses", {"input": items, "tools": [WEATHER]})
        assert second.json()["output"][0]["content"][0]["text"] == "It is sunny."

    asked(tiny, use)


BOGUS = {"type": "json_schema", "name": "a", "schema": {"type": "bogus"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": "a", "store": True}, "store"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "reasoning": {"effort": "low"}}, "reasoning"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"input": "a", "text": {"format": BOGUS}}, "text.format"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "temperature": 1000}, "temperature"),
        ({"input": "a", "unknown": 1}, "unknown"),
        ({"input": "a" * 4100}, "messages"),
    ],
)
def test_what_is_refused(tiny: Path, fields: dict[str, Any], param: str) -> None:
    async def use(client: Client) -> None:
        answer = await client.post("/v1/responses", fields)
        assert answer.status_code == 400, answer.text
        assert str(answer.json()["error"]["param"]).startswith(param), answer.text

    asked(tiny, use)


def test_formats_and_logprobs(tiny: Path) -> None:
    async def use(client: Client) -> None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
        form = {"type": "json_schema", "name": "empty", "schema": schema, "strict": True}
        body = {"input": "a", "text": {"format": form}, "max_output_tokens": 40}
        answer = (await client.post("/v1/responses", body)).json()
        assert answer["output"][0]["content"][0]["text"].strip().startswith("{")
        assert answer["text"]["format"]["name"] == "empty"
        body = {"input": "a", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
        answer = (await client.post("/v1/responses", body | {"max_output_tokens": 5})).json()
        entries = answer["output"][0]["content"][0]["logprobs"]
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 5

    asked(tiny, use)


def test_items_open_and_close_in_order() -> None:
    output = Output()
    deltas = [
        ReasoningDelta("hm"),
        ContentDelta("a"),
        ContentDelta("b"),
        CallStart(0, "f"),
        CallArguments(0, "{}"),
        CallEnd(0, "{}"),
        CallStart(1, "g"),
        CallEnd(1, ""),
        ContentDelta("c"),
    ]
    told = [event for delta in deltas for event in output.push(delta, [])]
    told += output.close()
    assert [item["type"] for item in output.content()] == [
        *("reasoning", "message", "function_call", "function_call", "message")
    ]
    for place, item in enumerate(output.content()):
        names = [name for name, fields in told if fields["output_index"] == place]
        assert names[0] == "response.output_item.added"
        assert names[-1] == "response.output_item.done"
        assert item["status"] == "completed"
    assert output.content()[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert [item.get("arguments") for item in output.content()[2:4]] == ["{}", ""]
