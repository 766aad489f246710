"""The published schema says what is answered; page, counts and log say what happened."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked
from pydantic import BaseModel

from qwenkit.server.guard import JsonLines
from qwenkit.server.health import Health, Ready
from qwenkit.server.models import Model, ModelList
from qwenkit.server.schema import ErrorAnswer
from qwenkit.server.settings import Access, ServerSettings
from qwenkit.server.tokens import DetokenizeAnswer, TokenizeAnswer
from qwenkit.server.wire import ollama
from qwenkit.server.wire.chat import ChatAnswer
from qwenkit.server.wire.completions import CompletionAnswer
from qwenkit.server.wire.embeddings import EmbeddingAnswer
from qwenkit.server.wire.responses import ResponsesAnswer
from scripted_server import script_of, scripted

CALL = "I look.\n✿FUNCTION✿: f\n✿ARGS✿: {}\n✿RESULT✿: x"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MODEL = {"model": "tiny"}
ANSWERS: list[tuple[str, str, Any, type[BaseModel]]] = [
    ("POST", "/v1/chat/completions", {"messages": HELLO}, ChatAnswer),
    ("POST", "/v1/chat/completions", {"messages": HELLO, "tools": [TOOL]}, ChatAnswer),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": HELLO, "functions": [TOOL["function"]], "n": 2},
        ChatAnswer,
    ),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stop": "look"},
        ChatAnswer,
    ),
    ("POST", "/v1/completions", {"prompt": "a", "logprobs": 1, "echo": True}, CompletionAnswer),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "stop": "I"}, CompletionAnswer),
    ("POST", "/v1/embeddings", {"input": "a"}, EmbeddingAnswer),
    ("POST", "/v1/embeddings", {"input": "a", "encoding_format": "base64"}, EmbeddingAnswer),
    ("POST", "/v1/responses", {"input": "a", "top_logprobs": 1}, ResponsesAnswer),
    (
        "POST",
        "/v1/responses",
        {"input": "a", "tools": [{"type": "function", "name": "f"}]},
        ResponsesAnswer,
    ),
    ("GET", "/v1/models", None, ModelList),
    ("GET", "/v1/models/tiny", None, Model),
    ("GET", "/v1/models/other", None, ErrorAnswer),
    ("POST", "/tokenize", {"prompt": "a"}, TokenizeAnswer),
    ("POST", "/detokenize", {"tokens": [97]}, DetokenizeAnswer),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "x"}]}, ErrorAnswer),
    ("GET", "/health", None, Health),
    ("GET", "/ready", None, Ready),
    ("POST", "/api/chat", {**MODEL, "messages": HELLO, "stream": False}, ollama.ChatLine),
    (
        "POST",
        "/api/chat",
        {**MODEL, "messages": HELLO, "stream": False, "tools": [TOOL]},
        ollama.ChatLine,
    ),
    ("POST", "/api/generate", {**MODEL, "prompt": "a", "stream": False}, ollama.GenerateLine),
    ("POST", "/api/embed", {**MODEL, "input": "a"}, ollama.Vectors),
    ("POST", "/api/show", MODEL, ollama.Shown),
    ("GET", "/api/tags", None, ollama.Tags),
    ("GET", "/api/ps", None, ollama.RunningTags),
    ("GET", "/api/version", None, ollama.Version),
]


def test_answers_have_the_shapes_that_are_published(tiny: Path) -> None:
    async def use(client: Client) -> None:
        published = (await client.http.get("/openapi.json")).json()
        with scripted(client.served.llm, script_of([["", CALL]])):
            for method, path, body, shape in ANSWERS:
                answer = await client.http.request(method, path, json=body)
                shape.model_validate_json(answer.text, strict=True)
                known = path.replace("/tiny", "/{model}").replace("/other", "/{model}")
                operation = published["paths"][known][method.lower()]
                said = operation["responses"][str(answer.status_code)]
                name = said["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                assert name == shape.__name__, (path, answer.text)

    asked(tiny, use)


def test_the_schema_is_whole(tiny: Path) -> None:
    access = Access(api_keys=("k",), users=(("a", "b"),))

    async def use(client: Client) -> None:
        headers = {"authorization": "Bearer k"}
        schema = (await client.http.get("/openapi.json", headers=headers)).json()
        text = json.dumps(schema)
        parts = schema["components"]["schemas"]
        named = {one.split('"')[0] for one in text.split("#/components/schemas/")[1:]}
        assert named <= set(parts)
        assert "HTTPValidationError" not in text
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                assert "422" not in operation["responses"], path
                assert operation["summary"], path
                if path in ("/health", "/ready"):
                    assert operation["security"] == []
                else:
                    assert {"400", "401", "429", "503"} <= set(operation["responses"])
        assert schema["security"] == [{"key": []}, {"password": []}]
        stream = schema["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
        assert set(stream) == {"application/json", "text/event-stream"}

    asked(tiny, use, ServerSettings(names=("tiny",), access=access))


def test_the_page_shows_every_path_and_needs_nothing_else(tiny: Path) -> None:
    async def use(client: Client) -> None:
        page = await client.http.get("/docs")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for path in (await client.http.get("/openapi.json")).json()["paths"]:
            assert path in page.text
        for word in ("<script", "http-equiv", "src=", "@import"):
            assert word not in page.text
        for field in ("max_completion_tokens", "guided_regex", "keep_alive", "max_output_tokens"):
            assert field in page.text

    asked(tiny, use)


def test_counts_of_requests_tokens_and_the_engine(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, script_of([["", "Hi."]])):
            await client.chat(n=2)
        await client.chat(temperatur=1)
        await client.http.get("/a/path/nobody/has")
        text = (await client.http.get("/metrics")).text
        for line in (
            'qwenkit_http_requests_total{method="POST",path="/v1/chat/completions",status="200"} 1',
            'qwenkit_http_requests_total{method="POST",path="/v1/chat/completions",status="400"} 1',
            'qwenkit_http_requests_total{method="GET",path="other",status="404"} 1',
            'qwenkit_tokens_total{kind="prompt"} 24',
            'qwenkit_tokens_total{kind="completion"} 8',
            'qwenkit_answers_ended_total{reason="stop"} 2',
            "qwenkit_first_token_seconds_count 1",
            "qwenkit_engine_alive 1",
            "qwenkit_engine_running 0",
            "qwenkit_answers 0",
        ):
            assert f"{line}.0\n" in text, line

    asked(tiny, use)


@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_line_of_log_for_each_request(tiny: Path, with_prompts: bool) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("qwenkit.server.requests")

    async def use(client: Client) -> None:
        with scripted(client.served.llm, script_of([["", "Reply\u2028."]])):
            await client.chat(max_tokens=20)
            await client.chat(stream=True, max_tokens=20)
            await client.post("/v1/completions", {"prompt": "Hello", "user": "u\nv"})
        await client.chat([{"role": "user", "content": "Secret"}], unknown="Secret")

    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        asked(tiny, use, ServerSettings(names=("tiny",), log_prompts=with_prompts))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 200, 400]
    assert lines[0]["completion_tokens"] == 10
    assert (lines[1]["stream"], lines[1]["finish"]) == (True, "stop")
    assert lines[2]["client"] == "127.0.0.1/u\nv"
    assert lines[3]["error"] == "unknown_parameter"
    assert all(line["request_id"].startswith("req_") for line in lines)
    assert ("Hello" in stream.getvalue()) == ("Reply" in stream.getvalue()) == with_prompts
    assert "Secret" not in stream.getvalue()
    if with_prompts:
        assert [line["replies"] for line in lines[:3]] == [["Reply\u2028."]] * 3
