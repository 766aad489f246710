"""The current openai client: what the page shows, async, its stream helpers, raw chunks, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel
from replies import ANSWER, CITY, GREETING, QUESTION, RESULT, TWO_CITIES

ASK = [{"role": "user", "content": QUESTION}]
HELLO = [{"role": "user", "content": "Hello!"}]


class GetWeather(BaseModel):
    city: str


def check(shown: dict[str, Any], url: str) -> None:
    tools = shown["tools"]
    check_shown(shown)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    check_plain(client)
    # A busy machine may send several tokens at once, but not all of them five times in a row.
    assert any(check_streamed_call(client, tools) > 1 for _ in range(5)), "all in one piece"
    check_stream_helper(client, tools)
    check_choice(client, tools)
    if shown["dialect"] != "react":  # it has one action at a time
        check_two_calls(client, tools)
    check_parsed_arguments(client)
    check_around(client)
    check_texts_and_vectors(client)
    asyncio.run(check_async(url, tools))


def check_shown(shown: dict[str, Any]) -> None:
    (choice,) = shown["asked"].choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.role == "assistant"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert call.id
    assert shown["answer"] == ANSWER
    check_usage(shown["asked"].usage)
    check_usage(shown["chunk"].usage)
    assert shown["city"] == type(shown["city"])(**CITY)
    assert shown["parsed"].choices[0].finish_reason == "stop"


def check_usage(usage: Any) -> None:
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def check_plain(client: OpenAI) -> None:
    told = client.chat.completions.create(model="default", messages=HELLO, temperature=0)
    assert told.object == "chat.completion"
    assert told.choices[0].message.content == GREETING
    assert told.choices[0].message.tool_calls is None
    assert told.choices[0].finish_reason == "stop"
    stopped = client.chat.completions.create(model="default", messages=HELLO, stop=["can I"])
    assert stopped.choices[0].message.content == GREETING.partition("can I")[0]
    assert stopped.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model="default", messages=HELLO, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    assert GREETING.startswith(short.choices[0].message.content)


def check_streamed_call(client: OpenAI, tools: Any) -> int:
    """Chunks as they come: role first, then one call by parts, one reason, one id for all. Returns
    in how many pieces the arguments came.
    """
    chunks = list(
        client.chat.completions.create(model="default", messages=ASK, tools=tools, stream=True)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert {part.index for part in parts} == {0}
    assert [part.function.name for part in parts if part.function.name] == ["get_weather"]
    assert len([part.id for part in parts if part.id]) == 1
    arguments = [part.function.arguments for part in parts if part.function.arguments]
    assert json.loads("".join(arguments)) == {"city": "Paris"}
    said = "".join(delta.content or "" for delta in deltas)  # ReAct's thought, else nothing
    assert said.strip() in ("", "I should use get_weather.")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]
    return len(arguments)


def check_stream_helper(client: OpenAI, tools: Any) -> None:
    with client.chat.completions.stream(model="default", messages=ASK, tools=tools) as stream:
        events = list(stream)
    final = stream.get_final_completion()
    deltas = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    (call,) = final.choices[0].message.tool_calls
    assert "".join(deltas) == call.function.arguments
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert (done.name, json.loads(done.arguments)) == ("get_weather", {"city": "Paris"})
    messages = [*ASK, final.choices[0].message]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    with client.chat.completions.stream(model="default", messages=messages, tools=tools) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == stream.get_final_completion().choices[0].message.content == ANSWER


def check_choice(client: OpenAI, tools: Any) -> None:
    """A call that must come, of any tool or of one that is named, and one that must not."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        told = client.chat.completions.create(
            model="default", messages=ASK, tools=tools, tool_choice=choice
        )
        (call,) = told.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
    told = client.chat.completions.create(
        model="default", messages=HELLO, tools=tools, tool_choice="none"
    )
    assert told.choices[0].message.content == GREETING
    assert told.choices[0].message.tool_calls is None


def check_two_calls(client: OpenAI, tools: Any) -> None:
    """Two calls in one reply, whole and streamed; one, where they may not come together."""
    ask = [{"role": "user", "content": TWO_CITIES}]
    told = client.chat.completions.create(model="default", messages=ask, tools=tools)
    whole = told.choices[0].message.tool_calls
    with client.chat.completions.stream(model="default", messages=ask, tools=tools) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    for calls in (whole, streamed):
        given = [json.loads(call.function.arguments) for call in calls]
        assert given == [{"city": "Paris"}, {"city": "Rome"}]
        assert len({call.id for call in calls}) == 2
    told = client.chat.completions.create(
        model="default", messages=ask, tools=tools, parallel_tool_calls=False
    )
    (call,) = told.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def check_parsed_arguments(client: OpenAI) -> None:
    """A tool made of a class, whose arguments come back as one."""
    told = client.chat.completions.parse(
        model="default",
        messages=ASK,
        tools=[pydantic_function_tool(GetWeather, name="get_weather")],
    )
    (call,) = told.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Paris")


def check_around(client: OpenAI) -> None:
    """The list of models, raw headers, and errors as the client's own types."""
    models = [model.id for model in client.models.list()]
    assert models
    told = client.chat.completions.create(model=models[0], messages=HELLO)
    assert told.model == models[0]
    raw = client.chat.completions.with_raw_response.create(model="default", messages=HELLO)
    assert raw.headers["x-request-id"]
    unknown = refusal(lambda: client.chat.completions.create(model="no-such", messages=HELLO))
    assert (type(unknown), unknown.code) == (openai.NotFoundError, "model_not_found")
    cold = refusal(
        lambda: client.chat.completions.create(model="default", messages=HELLO, temperature=-1)
    )
    assert (type(cold), cold.param) == (openai.BadRequestError, "temperature")


def check_texts_and_vectors(client: OpenAI) -> None:
    """Completions without a template; embeddings, which this client asks for in base64."""
    plain = client.completions.create(model="default", prompt="Hello!", max_tokens=64)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (GREETING, "stop")
    stream = client.completions.create(model="default", prompt="Hello!", max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == GREETING
    texts = ["Hello!", "Good evening"]
    packed = client.embeddings.create(model="default", input=texts)
    written = client.embeddings.create(model="default", input=texts, encoding_format="float")
    for one, other in zip(packed.data, written.data, strict=True):
        assert len(one.embedding) > 1
        assert all(abs(x - y) < 1e-6 for x, y in zip(one.embedding, other.embedding, strict=True))


def refusal(ask: Callable[[], Any]) -> openai.APIStatusError:
    try:
        ask()
    except openai.APIStatusError as error:
        return error
    raise AssertionError("the request was not refused")


async def check_async(url: str, tools: Any) -> None:
    """Eight conversations at once, the tool call streamed, the answer streamed."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(converse(client, tools) for _ in range(8)))
    assert answers == [ANSWER] * 8


async def converse(client: AsyncOpenAI, tools: Any) -> str:
    name = identifier = arguments = answer = ""
    stream = await client.chat.completions.create(
        model="default", messages=ASK, tools=tools, stream=True
    )
    async for chunk in stream:
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            identifier += part.id or ""
            arguments += part.function.arguments or ""
    assert name == "get_weather"
    function = {"name": name, "arguments": arguments}
    messages = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": identifier, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": identifier, "content": RESULT},
    ]
    stream = await client.chat.completions.create(
        model="default", messages=messages, tools=tools, stream=True
    )
    async for chunk in stream:
        answer += chunk.choices[0].delta.content or ""
    return answer
