"""/v1/chat/completions: what it answers, byte by byte where clients read bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked, data_of

from qwenkit.server.settings import ServerSettings
from scripted_server import script_of, scripted

HI = script_of([["", "Hi."]])
HEAD = (
    '{"id":"chatcmpl-ID","object":"chat.completion.chunk","created":TIME,"model":"tiny",'
    '"system_fingerprint":"FP","choices":'
)
GOLDEN_STREAM = "".join(
    f"data: {HEAD}{choices}}}\n\n"
    for choices in (
        '[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,'
        '"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"i"},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"."},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]',
    )
)
USAGE = (
    '{"prompt_tokens":24,"completion_tokens":4,"total_tokens":28,'
    '"prompt_tokens_details":{"cached_tokens":0}}'
)


def blank(text: str) -> str:
    """The text with everything that differs from run to run named."""
    text = re.sub(r"chatcmpl-[0-9a-f]{24}", "chatcmpl-ID", text)
    text = re.sub(r'"created":\d{10}', '"created":TIME', text)
    return re.sub(r"fp_[0-9a-f]{10}", "FP", text)


def content(answer: Any, index: int = 0) -> str:
    return str(answer.json()["choices"][index]["message"]["content"])


def test_the_whole_answer(tiny: Path) -> None:
    async def use(client: Client) -> None:
        with scripted(client.served.llm, HI):
            answer = await client.chat()
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert blank(answer.text) == (
            '{"id":"chatcmpl-ID","object":"chat.completion","created":TIME,"model":"tiny",'
            '"system_fingerprint":"FP","choices":[{"index":0,"message":{"role":"assistant",'
            '"content":"Hi.","refusal":null},"logprobs":null,"finish_reason":"stop"}],'
            f'"usage":{USAGE}}}'
        )

    asked(tiny, use)


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are there together come one after another, so that bytes can be compared."""
    from qwenkit.engine.service import AsyncEventStream

    async def ready(stream: AsyncEventStream) -> list[Any]:
        events = [event async for event in _first(stream)]
        return events

    async def _first(stream: AsyncEventStream) -> Any:
        async for event in stream:
            yield event
            if not stream._events or type(stream._events[0]).__name__ != "FinishEvent":
                return

    monkeypatch.setattr(AsyncEventStream, "ready", ready)


@pytest.mark.parametrize("with_usage", [False, True])
def test_the_bytes_of_a_stream(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, with_usage: bool
) -> None:
    one_at_a_time(monkeypatch)

    async def use(client: Client) -> None:
        more = {"stream_options": {"include_usage": True}} if with_usage else {}
        with scripted(client.served.llm, HI):
            answer = await client.chat(stream=True, **more)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        expected = GOLDEN_STREAM
        if with_usage:
            expected = expected.replace("]}\n", '],"usage":null}\n')
            expected += f'data: {HEAD}[],"usage":{USAGE}}}\n\n'
        assert blank(answer.text) == expected + "data: [DONE]\n\n"

    asked(tiny, use)


def test_a_stream_says_what_the_whole_answer_says(tiny: Path) -> None:
    async def use(client: Client) -> None:
        fields = {"n": 3, "seed": 5, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
        whole = (await client.chat(**fields)).json()
        chunks = data_of((await client.chat(stream=True, **fields)).text)
        assert chunks.pop() == "[DONE]"
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        for choice in whole["choices"]:
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            text = "".join(one["delta"].get("content", "") for one in own)
            assert text == choice["message"]["content"]
            entries = [e for one in own if one["logprobs"] for e in one["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"]
            assert len(entries) == 30
            assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
            assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
            assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        assert whole["usage"]["completion_tokens"] == 90
        texts = [choice["message"]["content"] for choice in whole["choices"]]
        alone = [content(await client.chat(**fields | {"n": 1, "seed": 5 + i})) for i in range(3)]
        assert texts == alone  # each with the next seed

    asked(tiny, use)


def test_the_best_of_several_come_first(tiny: Path) -> None:
    async def use(client: Client) -> None:
        fields = {"seed": 1, "max_tokens": 6, "temperature": 2.0, "logprobs": True}
        every = (await client.chat(n=6, **fields)).json()["choices"]
        best = (await client.chat(n=2, best_of=6, **fields)).json()["choices"]

        def mean(choice: Any) -> float:
            entries = choice["logprobs"]["content"]
            return float(sum(e["logprob"] for e in entries) / len(entries))

        ranked = sorted(every, key=mean, reverse=True)[:2]
        assert [c["message"]["content"] for c in best] == [c["message"]["content"] for c in ranked]

    asked(tiny, use)


def test_sampling_fields_do_what_they_say(tiny: Path) -> None:
    async def use(client: Client) -> None:
        greedy = content(await client.chat(temperature=0))
        assert content(await client.chat(temperature=0.009)) == greedy  # as the original had it
        assert content(await client.chat(top_k=1, seed=3)) == greedy
        assert content(await client.chat(seed=3)) == content(await client.chat(seed=3))
        forced = await client.chat(logit_bias={"97": 100}, temperature=0, max_tokens=3)
        assert content(forced) == "aaa"
        ended = await client.chat(logit_bias={"258": 100}, temperature=0)
        assert (content(ended), ended.json()["choices"][0]["finish_reason"]) == ("", "stop")
        longer = await client.chat(
            logit_bias={"258": 100}, temperature=0, min_tokens=2, max_tokens=3
        )
        assert longer.json()["usage"]["completion_tokens"] == 3
        ignoring = await client.chat(logit_bias={"258": 100}, ignore_eos=True, temperature=0)
        assert ignoring.json()["choices"][0]["finish_reason"] == "length"

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_stops_end_before_their_text_wherever_it_is_split(tiny: Path, stream: bool) -> None:
    async def use(client: Client) -> None:
        script = script_of([["", "One. Observation: two"]])
        cases = [
            ({"stop": ["Observation:"]}, "One. ", "Observation:"),
            ({"stop": "One"}, "", "One"),
            ({"stop": ["two", ". "]}, "One", ". "),
            ({"stop": ["three"]}, "One. Observation: two", None),
            ({"stop_token_ids": [46]}, "One", 46),
        ]
        for fields, expected, reason in cases:
            with scripted(client.served.llm, script):
                answer = await client.chat(max_tokens=64, stream=stream, **fields)
            if stream:
                choices = [c["choices"][0] for c in data_of(answer.text)[:-1]]
                text = "".join(choice["delta"].get("content", "") for choice in choices)
            else:
                choices, text = answer.json()["choices"], content(answer)
            assert (text, choices[-1]["finish_reason"]) == (expected, "stop")
            assert choices[-1].get("stop_reason") == reason

    asked(tiny, use)


def test_formats_and_guided_fields_are_kept(tiny: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    closed = {**schema, "additionalProperties": False}

    async def use(client: Client) -> None:
        for fields, pattern in [
            ({"guided_choice": ["yes", "no"]}, "yes|no"),
            ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
            ({"guided_grammar": 'start: "x" "y"'}, "xy"),
            ({"guided_json": closed}, r'\{\s*"a"\s*:\s*1\s*\}'),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "one", "schema": closed, "strict": True},
                    }
                },
                r'\{\s*"a"\s*:\s*1\s*\}',
            ),
            ({"response_format": {"type": "json_object"}}, r"\{.*"),
            ({"response_format": {"type": "text"}}, ".*"),
        ]:
            answer = await client.chat(max_tokens=60, **fields)
            assert answer.status_code == 200, answer.text
            assert re.fullmatch(pattern, content(answer), re.DOTALL), content(answer)

    asked(tiny, use)


def test_guards_and_deadlines_have_reasons_of_their_own(tiny: Path) -> None:
    async def use(client: Client) -> None:
        def reason(answer: Any) -> str:
            return str(answer.json()["choices"][0]["finish_reason"])

        with scripted(client.served.llm, script_of([["", "ab" * 40 + "字"]])):
            loop = {"repeats": 2, "tokens": 8}
            assert reason(await client.chat(loop_detection=loop, max_tokens=99)) == "loop"
            latin = await client.chat(allowed_scripts=["Latin"], max_tokens=99)
            assert (reason(latin), content(latin)) == ("language", "ab" * 40)
        assert reason(await client.chat(timeout_s=1e-9, max_tokens=4000)) == "timeout"

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_message_of_the_assistants_is_continued(tiny: Path, stream: bool) -> None:
    open_turn = [*HELLO, {"role": "assistant", "content": "Good"}]

    async def use(client: Client) -> None:
        seen: list[str] = []

        def script(prompt: str) -> str:
            seen.append(prompt)
            return " day"

        with scripted(client.served.llm, script):
            for fields in (
                {},
                {"continue_final_message": True},
                {"continue_final_message": False},
                {"add_generation_prompt": True},
            ):
                assert (await client.chat(open_turn, stream=stream, **fields)).status_code == 200
        closed = "<|im_start|>assistant\nGood<|im_end|>\n<|im_start|>assistant\n"
        assert [prompt.endswith("assistant\nGood") for prompt in seen] == [True, True, False, False]
        assert [prompt.endswith(closed) for prompt in seen] == [False, False, True, True]

    asked(tiny, use)


def test_lengths_are_bounded_by_each_name(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for fields, tokens in [
            ({"max_tokens": 3}, 3),
            ({"max_tokens": None, "max_completion_tokens": 4}, 4),
            ({"max_tokens": 4, "max_completion_tokens": 4}, 4),
            ({"max_tokens": None, "max_length": 30}, 6),  # of which the prompt has 24
            ({"max_tokens": 2, "max_length": 30}, 2),
        ]:
            answer = await client.chat(temperature=0, ignore_eos=True, **fields)
            assert answer.json()["usage"]["completion_tokens"] == tokens
        refused = await client.chat(max_length=24)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_length")

    asked(tiny, use)


def test_names_of_the_model_and_what_answers_bear(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for name in (None, "one", "two", "default", "Qwen"):
            assert (await client.chat(model=name)).json()["model"] == "one"
        unknown = await client.chat(model="tow")
        assert unknown.status_code == 404
        error = unknown.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'two'" in error["message"]
        assert "--served-model-name" in error["message"]
        listed = (await client.http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["one", "two"]

    asked(tiny, use, ServerSettings(names=("one", "two"), aliases=("Qwen",)))


def test_a_prompt_that_was_seen_is_counted_as_cached(tiny: Path) -> None:
    async def use(client: Client) -> None:
        long = [{"role": "user", "content": "Hello " * 20}]
        first, second = [(await client.chat(long)).json()["usage"] for _ in range(2)]
        assert first["prompt_tokens_details"] == {"cached_tokens": 0}
        assert second["prompt_tokens_details"]["cached_tokens"] > 100
        salted = (await client.chat(long, cache_salt="mine")).json()["usage"]
        assert salted["prompt_tokens_details"] == {"cached_tokens": 0}

    asked(tiny, use)
