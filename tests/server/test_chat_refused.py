"""What /v1/chat/completions refuses: by the field's name, in the original's words if it had any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "function", "name": "f", "content": "1"}
FUNCTIONS = [{"name": "f", "description": "d", "parameters": {"type": "object"}}]

OLD_WORDS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Expecting at least one user message.", [{"role": "system", "content": "s"}], {}),
    ("Expecting at least one user message.", [ASSISTANT], {}),
    ("Expecting role assistant before role function.", [USER, RESULT], {}),
    ("Expecting role assistant before role tool.", [USER, {"role": "tool", "content": "1"}], {}),
    ("Expecting role user before role assistant.", [ASSISTANT, USER], {}),
    ("Incorrect role robot.", [{"role": "robot", "content": "a"}], {}),
    (
        "Expecting exactly one user (or function) role before every assistant role.",
        [USER, USER, ASSISTANT, USER],
        {"functions": FUNCTIONS, "chat": "react"},
    ),
]


@pytest.mark.parametrize(("words", "messages", "more"), OLD_WORDS)
def test_conversations_are_refused_in_the_original_words(
    tiny: Path, words: str, messages: list[Any], more: dict[str, Any]
) -> None:
    async def use(client: Client) -> None:
        fields = dict(more)
        if fields.pop("chat", None):  # a model of the first generation
            client.served.llm.record = react(client)
        for stream in (False, True):
            answer = await client.chat(messages, stream=stream, **fields)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["message"].startswith(f"Invalid request: {words}")
            assert answer.json()["detail"] == f"Invalid request: {words}"
            assert error["param"].startswith("messages")
            assert error["type"] == "invalid_request_error"

    asked(tiny, use)


def react(client: Client) -> Any:
    from dataclasses import replace

    return replace(client.served.llm.record, dialect="react")


def test_what_the_original_could_not_do_is_done(tiny: Path) -> None:
    """It had: "Function calling is not yet implemented for stream mode."."""

    async def use(client: Client) -> None:
        answer = await client.chat([USER, CALL, RESULT], functions=FUNCTIONS, stream=True)
        assert answer.status_code == 200

    asked(tiny, use)


STRICT = {"name": "f", "strict": True, "parameters": {"type": "objekt"}}
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"store": True}, "store"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"temperatur": 1}, "temperatur"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, None),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 20, "n": 30}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "ab", "ignore_eos": True}, "guided_regex"),
    ({"guided_regex": "ab", "min_tokens": 5}, "min_tokens"),
    (
        {"tools": [{"type": "function", "function": STRICT}], "tool_choice": "required"},
        "tools[0].function.parameters",
    ),
    ({"guided_grammar": "root ::= root"}, "guided_grammar"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
        "response_format.json_schema.schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "bogus"}},
            }
        },
        "response_format",
    ),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": FUNCTIONS, "tools": []}, "functions"),
    ({"functions": FUNCTIONS, "function_call": {"name": "g"}}, "function_call"),
    ({"functions": [{"description": "no name"}]}, "functions[0].name"),
    ({"functions": FUNCTIONS * 2}, "functions"),
    ({"tools": [{"type": "bogus"}]}, "tools[0].type"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0]"),
    ({"messages": [{**USER, "audio": {}}]}, "messages[0].audio"),
    ({"model": 5}, "model"),
    ({"model": "../etc"}, "model"),
    ({"user": "u" * 257}, "user"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 1e30}, "priority"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"allowed_scripts": ["Klingon"]}, "allowed_scripts"),
    ({"loop_detection": {"repeats": 0}}, "loop_detection.repeats"),
    ({"stream": True, "n": 2, "best_of": 3}, "best_of"),
    ({"n": 3, "best_of": 2}, "best_of"),
]


def test_fields_are_refused_by_their_names(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for fields, param in FIELDS:
            answer = await client.post("/v1/chat/completions", {"messages": HELLO, **fields})
            assert 400 <= answer.status_code < 500, (fields, answer.text)
            error = answer.json()["error"]
            if param is not None:
                assert str(error["param"]).startswith(param), (fields, error)
                assert param.split("[")[0].split(".")[0] in error["message"], (fields, error)
            assert error["type"] == "invalid_request_error"
        assert client.served.requests == 0

    asked(tiny, use)


def test_what_asks_for_nothing_is_taken(tiny: Path) -> None:
    nothing = {
        **dict.fromkeys(("audio", "web_search_options", "prediction", "metadata", "verbosity")),
        "store": False,
        "modalities": ["text"],
        "service_tier": "auto",
        "stop": None,
        "stream": None,
        "logit_bias": None,
        "tools": None,
        "response_format": None,
        "safety_identifier": "me",
        "prompt_cache_key": "k",
    }
    given_back = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    developer = {"role": "developer", "content": "d"}

    async def use(client: Client) -> None:
        answer = await client.chat([developer, parts, given_back, USER], **nothing)
        assert answer.status_code == 200, answer.text

    asked(tiny, use)


def test_a_prompt_too_long_is_refused_with_both_counts(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for size in (4096, 8192):
            long = [{"role": "user", "content": "a" * size}]
            for more in ({}, {"max_tokens": 5}, {"tools": []}, {"stream": True}):
                answer = await client.post("/v1/chat/completions", {"messages": long, **more})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
                assert f"{size + 19} tokens, the context 4096" in error["message"]

    asked(tiny, use)
