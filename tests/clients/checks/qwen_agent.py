"""qwen-agent with the server's tools, and with its own two forms of prompt."""

from __future__ import annotations

import json
from typing import Any

from qwen_agent.llm import get_chat_model
from replies import ANSWER, GREETING, RESULT


def check(shown: dict[str, Any], url: str) -> None:
    check_replies(shown["replies"])
    llm = {"model": "default", "model_server": f"{url}/v1", "api_key": "none"}
    check_own_prompt(shown, llm)
    check_first_template(shown, llm)


def check_replies(replies: list[dict[str, Any]]) -> None:
    called, told, answer = replies
    assert called["function_call"]["name"] == "get_weather"
    assert json.loads(called["function_call"]["arguments"]) == {"city": "Paris"}
    assert (told["role"], told["name"], told["content"]) == ("function", "get_weather", RESULT)
    assert (answer["role"], answer["content"]) == ("assistant", ANSWER)


def check_own_prompt(shown: dict[str, Any], llm: dict[str, Any]) -> None:
    """Without the server's tools: what looks like a call stays text, and qwen-agent reads it."""
    assistant = type(shown["assistant"])(llm=llm, function_list=["get_weather"])
    *_, replies = assistant.run(messages=shown["messages"])
    check_replies(replies)
    *_, (greeting,) = assistant.run(messages=[{"role": "user", "content": "Hello!"}])
    assert greeting["content"] == GREETING


def check_first_template(shown: dict[str, Any], llm: dict[str, Any]) -> None:
    """The template of Qwen2, with its stop words. Streamed, qwen-agent itself fails with it on any
    OpenAI server: it takes the last message of a first chunk that has none yet.
    """
    model = get_chat_model({**llm, "generate_cfg": {"fncall_prompt_type": "qwen"}})
    functions = [shown["GetWeather"]().function]
    messages = list(shown["messages"])
    (called,) = model.chat(messages=messages, functions=functions, stream=False)
    messages.append(called)
    messages.append({"role": "function", "name": "get_weather", "content": RESULT})
    (answer,) = model.chat(messages=messages, functions=functions, stream=False)
    check_replies([called, messages[-1], answer])
