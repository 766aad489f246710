"""litellm: the call, the answer, streams rebuilt, async, a schema, through two of its providers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from replies import ANSWER, CITY, GREETING, QUESTION

ASK = [{"role": "user", "content": QUESTION}]
HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "country": {"type": "string"}},
    "required": ["name", "country"],
    "additionalProperties": False,
}


def check(shown: dict[str, Any], url: str) -> None:
    check_call(shown["asked"])
    assert shown["answer"] == ANSWER
    for address in (
        shown["address"],
        {"model": "openai/default", "api_base": f"{url}/v1", "api_key": "none"},
    ):
        check_stream(address, shown["tools"])
        check_schema(address)
    asyncio.run(check_async(shown["address"]))


def check_call(asked: Any) -> None:
    (choice,) = asked.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    usage = asked.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0


def check_stream(address: dict[str, str], tools: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**address, messages=ASK, tools=tools, **options))
    check_call(litellm.stream_chunk_builder(chunks, messages=ASK))
    chunks = list(litellm.completion(**address, messages=HELLO, **options))
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert whole.choices[0].message.content == GREETING
    assert whole.choices[0].finish_reason == "stop"


def check_schema(address: dict[str, str]) -> None:
    told = litellm.completion(
        **address,
        messages=[{"role": "user", "content": "Which city has the Eiffel Tower?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": SCHEMA, "strict": True},
        },
    )
    assert json.loads(told.choices[0].message.content) == CITY


async def check_async(address: dict[str, str]) -> None:
    told = await litellm.acompletion(**address, messages=HELLO)
    assert told.choices[0].message.content == GREETING
