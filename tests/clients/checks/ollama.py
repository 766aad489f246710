"""Ollama's own client: the call, the answer, a schema, plain completion, vectors, the models."""

from __future__ import annotations

import json
from typing import Any

import ollama
from pydantic import BaseModel
from replies import ANSWER, CITY, GREETING, QUESTION

HELLO = [{"role": "user", "content": "Hello!"}]


class City(BaseModel):
    name: str
    country: str


def check(shown: dict[str, Any], url: str) -> None:
    (call,) = shown["asked"].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    assert shown["answer"] == ANSWER
    last = shown["part"]
    assert (last.done, last.done_reason) == (True, "stop")
    assert last.prompt_eval_count > 0
    assert last.eval_count > 0
    client: ollama.Client = shown["client"]
    asked = {"messages": [{"role": "user", "content": QUESTION}], "tools": [shown["get_weather"]]}
    parts = list(client.chat("default", **asked, stream=True))
    (call,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert call.function.arguments == {"city": "Paris"}
    check_others(client)


def check_others(client: ollama.Client) -> None:
    told = client.chat(
        "default",
        [{"role": "user", "content": "Which city has the Eiffel Tower?"}],
        format=City.model_json_schema(),
        options={"temperature": 0},
    )
    assert City.model_validate_json(told.message.content) == City(**CITY)
    assert json.loads(told.message.content) == CITY
    assert client.generate("default", "Hello!").response == GREETING
    streamed = client.generate("default", "Hello!", stream=True)
    assert "".join(part.response for part in streamed) == GREETING
    one, other = client.embed("default", ["Hello!", "Good evening"]).embeddings
    assert len(one) == len(other) > 1
    (model, *_) = client.list().models
    assert client.chat(model.model, HELLO).message.content == GREETING
