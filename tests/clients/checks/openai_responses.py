"""The current openai client on the responses API: text, a function's call, streams, a class."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from replies import ANSWER, CITY, GREETING, QUESTION, RESULT


class City(BaseModel):
    name: str
    country: str


def check(shown: dict[str, Any], url: str) -> None:
    assert shown["answer"] == ANSWER
    (call,) = shown["calls"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    assert call.call_id
    assert shown["told"].status == "completed"
    usage = shown["told"].usage
    assert usage.input_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    check_stream(client, shown["tools"])
    check_parsed(client)
    asyncio.run(check_async(url))


def check_stream(client: OpenAI, tools: Any) -> None:
    with client.responses.stream(model="default", input=QUESTION, tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    (call,) = [item for item in final.output if item.type == "function_call"]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    given = [
        {"role": "user", "content": QUESTION},
        {
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        },
        {"type": "function_call_output", "call_id": call.call_id, "output": RESULT},
    ]
    with client.responses.stream(model="default", input=given, tools=tools) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == ANSWER


def check_parsed(client: OpenAI) -> None:
    parsed = client.responses.parse(
        model="default", input="Which city has the Eiffel Tower?", text_format=City
    )
    assert parsed.output_parsed == City(**CITY)


async def check_async(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        told = await client.responses.create(
            model="default", input="Hello!", instructions="Be kind.", max_output_tokens=64
        )
    assert told.output_text == GREETING
