"""Ollama's endpoints: its shapes, streamed as lines of JSON unless asked otherwise."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked

from scripted_server import script_of, scripted

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = 'I look.\n✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Paris"}\n✿RESULT✿: never'
SCRIPT = script_of([["20 degrees", "It is sunny."], ["weather in", CALL], ["", "Hi."]])
COUNTS = {
    *("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"),
    *("eval_count", "eval_duration"),
}


def lines_of(answer: Any) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson", answer.text
    assert answer.text.endswith("}\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def check_end(line: dict[str, Any], prompt_tokens: int, tokens: int) -> None:
    assert (line["done"], line["done_reason"]) == (True, "stop")
    assert set(line) >= COUNTS
    assert all(type(line[name]) is int for name in COUNTS)
    assert (line["prompt_eval_count"], line["eval_count"]) == (prompt_tokens, tokens)
    assert datetime.fromisoformat(line["created_at"]).tzinfo is not None


def test_chat_streams_lines_and_ends_with_counts(tiny: Path) -> None:
    async def use(client: Client) -> None:
        body = {"model": "tiny:latest", "messages": HELLO}
        with scripted(client.served.llm, SCRIPT):
            lines = lines_of(await client.post("/api/chat", body))
            whole = (await client.post("/api/chat", body | {"stream": False})).json()
        assert "".join(line["message"]["content"] for line in lines) == "Hi."
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert {line["model"] for line in lines} == {"tiny"}
        check_end(lines[-1], 24, 4)
        assert whole["message"] == {"role": "assistant", "content": "Hi."}
        check_end(whole, 24, 4)

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_whole_with_objects_as_arguments(tiny: Path, stream: bool) -> None:
    messages = [{"role": "user", "content": "weather in Paris?"}]

    async def use(client: Client) -> None:
        body = {"model": "tiny", "messages": messages, "tools": [WEATHER], "stream": stream}
        with scripted(client.served.llm, SCRIPT):
            answer = await client.post("/api/chat", body)
            lines = lines_of(answer) if stream else [answer.json()]
            calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
            assert calls == [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]
            assert lines[-1]["done_reason"] == "stop"
            told = {"role": "assistant", "content": "I look.", "tool_calls": calls}
            result = {"role": "tool", "tool_name": "weather", "content": "20 degrees"}
            body |= {"messages": [*messages, told, result], "stream": False}
            again = (await client.post("/api/chat", body)).json()
            assert again["message"]["content"] == "It is sunny."

    asked(tiny, use)


def test_generate_answers_through_the_template_or_raw(tiny: Path) -> None:
    async def use(client: Client) -> None:
        seen: list[str] = []

        def script(prompt: str) -> str:
            seen.append(prompt)
            return "Hi."

        with scripted(client.served.llm, script):
            body = {"model": "default", "prompt": "Hello", "stream": False}
            answer = (await client.post("/api/generate", body)).json()
            assert answer["response"] == "Hi."
            check_end(answer, 24, 4)
            await client.post("/api/generate", body | {"system": "Be kind."})
            raw = (await client.post("/api/generate", body | {"raw": True})).json()
            check_end(raw, 5, 4)
            lines = lines_of(await client.post("/api/generate", body | {"stream": True}))
            assert "".join(line["response"] for line in lines) == "Hi."
        assert seen[0] == seen[3] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert seen[1].startswith("<|im_start|>system\nBe kind.<|im_end|>")
        assert seen[2] == "Hello"
        loaded = (await client.post("/api/generate", {"model": "tiny"})).json()
        assert (loaded["response"], loaded["done_reason"]) == ("", "load")

    asked(tiny, use)


def test_options_are_kept(tiny: Path) -> None:
    async def use(client: Client) -> None:
        async def text(**fields: Any) -> str:
            body = {"model": "tiny", "messages": HELLO, "stream": False, **fields}
            answer = await client.post("/api/chat", body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["message"]["content"])

        async def openai(**fields: Any) -> str:
            answer = (await client.chat(**fields)).json()
            return str(answer["choices"][0]["message"]["content"])

        options = {"num_predict": 6, "seed": 3, "temperature": 1.5, "repeat_penalty": 1.2}
        same = {"max_tokens": 6, "seed": 3, "temperature": 1.5, "repetition_penalty": 1.2}
        assert await text(options=options) == await openai(**same)
        greedy = {"num_predict": 6, "temperature": 0}
        expected = await openai(max_tokens=6, temperature=0)
        assert await text(options=greedy) == expected
        harmless = {
            "num_ctx": 4096,
            "num_keep": 5,
            "mirostat": 0,
            "repeat_last_n": -1,
            "tfs_z": 1.0,
        }
        answer = await text(options={**greedy, **harmless}, keep_alive="5m", think=False)
        assert answer == expected
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
        for form in ("json", schema):
            limits = {"num_predict": 30}
            assert (await text(format=form, options=limits)).strip().startswith("{")

    asked(tiny, use)


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("chat", {"model": "other"}, 404, "not served here"),
        ("chat", {"messages": [{"role": "user", "images": ["x"]}]}, 400, "images"),
        ("chat", {"options": {"num_ctx": 5000}}, 400, "--context 5000"),
        ("chat", {"format": {"type": "bogus"}}, 400, "format: cannot be compiled"),
        ("chat", {"options": {"num_gpu": 1}}, 400, "when the server starts"),
        ("chat", {"options": {"mirostat": 1}}, 400, "mirostat"),
        ("chat", {"options": {"temprature": 1}}, 400, "'temperature'"),
        ("chat", {"keep_alive": 0}, 400, "keep_alive"),
        ("chat", {"think": True}, 400, "think"),
        ("chat", {"truncate": True}, 400, "truncate"),
        ("generate", {"prompt": "a", "context": [1]}, 400, "context"),
        ("generate", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("generate", {"prompt": "a", "template": "b"}, 400, "template"),
        ("generate", {"prompt": "a", "raw": True, "system": "b"}, 400, "system"),
        ("generate", {"prompt": "a" * 4100}, 400, "4096"),
        ("embed", {"input": ""}, 400, "input"),
        ("show", {"model": "other"}, 404, "not served here"),
    ],
)
def test_refusals_are_a_text(
    tiny: Path, path: str, fields: dict[str, Any], status: int, words: str
) -> None:
    async def use(client: Client) -> None:
        more = {"messages": HELLO} if path == "chat" else {}
        answer = await client.post(f"/api/{path}", {"model": "tiny", **more, **fields})
        assert answer.status_code == status, answer.text
        assert list(answer.json()) == ["error"]
        assert words in answer.json()["error"]

    asked(tiny, use)


def test_what_is_served_is_told(tiny: Path) -> None:
    async def use(client: Client) -> None:
        (tag,) = (await client.http.get("/api/tags")).json()["models"]
        assert (tag["name"], tag["details"]["family"]) == ("tiny", "qwen2")
        assert len(tag["digest"]) == 64
        assert tag["size"] > 0
        (loaded,) = (await client.http.get("/api/ps")).json()["models"]
        assert loaded["name"] == "tiny"
        shown = (await client.post("/api/show", {"model": "tiny:latest"})).json()
        assert shown["model_info"]["qwen2.context_length"] == 4096
        assert shown["capabilities"] == ["completion", "embedding", "tools"]
        assert "im_start" in shown["template"]
        assert "version" in (await client.http.get("/api/version")).json()
        vectors = (await client.post("/api/embed", {"model": "tiny", "input": ["a", "b"]})).json()
        expected = (await client.served.llm.embed(["a", "b"])).tolist()
        assert vectors["embeddings"] == expected
        one = (await client.post("/api/embed", {"model": "tiny", "input": "a"})).json()
        assert one["embeddings"] == expected[:1]

    asked(tiny, use)
