"""The client of 2023 with the calls of the original's examples, test cases 1 to 3."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from replies import ANSWER, GREETING, QUESTION


def check(shown: dict[str, Any], url: str) -> None:
    (choice,) = shown["asked"].choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_current_weather"
    assert json.loads(choice.message.function_call.arguments) == {"location": "Paris"}
    assert shown["answer"] == ANSWER
    assert shown["told"].choices[0].finish_reason == "stop"
    assert shown["told"].usage.total_tokens > 0
    assert shown["streamed"] == GREETING
    check_published_functions()
    check_streamed_function(shown["functions"])
    asyncio.run(check_async())


def check_published_functions() -> None:
    """Functions in Qwen's own form of 2023, whose parameters are a list."""
    functions = [
        {
            "name_for_human": "Google Search",
            "name_for_model": "google_search",
            "description_for_model": "A search engine. Format the arguments as a JSON object.",
            "parameters": [
                {
                    "name": "search_query",
                    "description": "What to search for",
                    "required": True,
                    "schema": {"type": "string"},
                }
            ],
        }
    ]
    messages = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": GREETING},
        {"role": "user", "content": "Who is Jay Chou?"},
    ]
    asked = openai.ChatCompletion.create(model="Qwen", messages=messages, functions=functions)
    called = asked.choices[0].message.function_call
    assert (called.name, json.loads(called.arguments)) == (
        "google_search",
        {"search_query": "Jay Chou"},
    )
    messages += [
        {
            "role": "assistant",
            "content": "Thought: I should look this up.",
            "function_call": {"name": "google_search", "arguments": called.arguments},
        },
        {"role": "function", "name": "google_search", "content": "A singer from Taiwan."},
    ]
    told = openai.ChatCompletion.create(model="Qwen", messages=messages, functions=functions)
    assert told.choices[0].message.content == "Jay Chou is a singer from Taiwan."


def check_streamed_function(functions: Any) -> None:
    """What the original refused: a function's call in a stream."""
    name, arguments, reasons = "", [], []
    for chunk in openai.ChatCompletion.create(
        model="Qwen",
        messages=[{"role": "user", "content": QUESTION}],
        functions=functions,
        stream=True,
    ):
        call = chunk.choices[0].delta.get("function_call") or {}
        name += call.get("name") or ""
        arguments.append(call.get("arguments") or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, json.loads("".join(arguments))) == ("get_current_weather", {"location": "Paris"})
    assert reasons[-1] == "function_call"


async def check_async() -> None:
    told = await openai.ChatCompletion.acreate(
        model="Qwen", messages=[{"role": "user", "content": "Hello!"}], stop=["Observation:"]
    )
    assert told.choices[0].message.content == GREETING
