"""/v1/completions, /v1/embeddings, /tokenize and /detokenize."""

from __future__ import annotations

import base64
import math
import re
from array import array
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked, data_of

from qwenkit.server.settings import ServerSettings
from scripted_server import script_of, scripted

HEAD = (
    '{"id":"cmpl-ID","object":"text_completion","created":TIME,"model":"tiny",'
    '"system_fingerprint":"FP","choices":'
)


def blank(text: str) -> str:
    text = re.sub(r"cmpl-[0-9a-f]{24}", "cmpl-ID", text)
    text = re.sub(r'"created":\d{10}', '"created":TIME', text)
    return re.sub(r"fp_[0-9a-f]{10}", "FP", text)


def test_the_bytes_of_an_answer_and_a_stream(tiny: Path) -> None:
    usage = (
        '{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )

    async def use(client: Client) -> None:
        with scripted(client.served.llm, script_of([["", "!"]])):
            whole = await client.post("/v1/completions", {"prompt": "abc"})
            fields = {"prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
            stream = await client.post("/v1/completions", fields)
        assert blank(whole.text) == (
            f'{HEAD}[{{"text":"!","index":0,"logprobs":null,"finish_reason":"stop"}}],'
            f'"usage":{usage}}}'
        )
        lines = blank(stream.text)
        begun = f'data: {HEAD}[{{"text":"!","index":0,"logprobs":null,"finish_reason":'
        assert lines.startswith(begun)
        assert lines.endswith(f'data: {HEAD}[],"usage":{usage}}}\n\ndata: [DONE]\n\n')
        choices = [c["choices"][0] for c in data_of(stream.text)[:-2]]
        assert "".join(choice["text"] for choice in choices) == "!"
        assert choices[-1]["finish_reason"] == "stop"

    asked(tiny, use)


def test_prompts_of_every_kind_in_their_order(tiny: Path) -> None:
    async def use(client: Client) -> None:
        async def texts(prompt: Any, **fields: Any) -> list[str]:
            body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}
            answer = (await client.post("/v1/completions", body)).json()
            assert [c["index"] for c in answer["choices"]] == list(range(len(answer["choices"])))
            return [choice["text"] for choice in answer["choices"]]

        (one,) = await texts("abc")
        (other,) = await texts("xyz")
        assert await texts([97, 98, 99]) == [one]
        assert await texts(["abc", "xyz"]) == [one, other]
        assert await texts([[97, 98, 99], [120, 121, 122]]) == [one, other]
        assert await texts(["abc", "xyz"], n=2) == [one, one, other, other]
        assert await texts(["abc", "xyz"], echo=True) == [f"abc{one}", f"xyz{other}"]
        assert await texts([120, 121, 122], echo=True) == [f"xyz{other}"]
        body = {"prompt": ["abc", "xyz"], "max_tokens": 5, "temperature": 0, "n": 2, "echo": True}
        chunks = await client.events("/v1/completions", body)
        found = [""] * 4
        for choice in (chunk["choices"][0] for chunk in chunks[:-1]):
            found[choice["index"]] += choice["text"]
        assert found == [f"abc{one}"] * 2 + [f"xyz{other}"] * 2
        assert len(await texts("abc", max_tokens=None)) == 1  # sixteen tokens, as OpenAI has it

    asked(tiny, use)


def test_logprobs_of_prompt_and_answer(tiny: Path) -> None:
    async def use(client: Client) -> None:
        body = {"prompt": "abc", "max_tokens": 3, "logprobs": 2, "echo": True, "temperature": 0}
        answer = (await client.post("/v1/completions", body)).json()["choices"][0]
        shown = answer["logprobs"]
        assert {len(values) for values in shown.values()} == {6}
        assert shown["tokens"][:3] == ["a", "b", "c"]
        assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
        assert shown["text_offset"][:4] == [0, 1, 2, 3]
        scored = await client.served.llm.score([([97], [98, 99])])
        assert math.isclose(sum(shown["token_logprobs"][1:3]), scored[0].logprob_sum, rel_tol=1e-6)
        only = (await client.post("/v1/completions", body | {"max_tokens": 0})).json()
        assert only["choices"][0]["text"] == "abc"
        assert only["choices"][0]["finish_reason"] == "length"
        assert only["choices"][0]["logprobs"]["token_logprobs"] == shown["token_logprobs"][:3]
        assert only["usage"]["completion_tokens"] == 0
        without = (await client.post("/v1/completions", body | {"echo": False})).json()
        assert without["choices"][0]["logprobs"]["tokens"] == shown["tokens"][3:]
        merged: dict[str, list[Any]] = {key: [] for key in shown}
        for chunk in (await client.events("/v1/completions", body))[:-1]:
            for key, values in (chunk["choices"][0]["logprobs"] or {}).items():
                merged[key] += values
        assert merged == shown

    asked(tiny, use)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [470]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": "a", "best_of": 9}, "best_of"),
        ({"prompt": "a", "messages": HELLO}, "messages"),
        ({"prompt": "a" * 4096}, "prompt"),
    ],
)
def test_what_is_refused(tiny: Path, fields: dict[str, Any], param: str) -> None:
    async def use(client: Client) -> None:
        answer = await client.post("/v1/completions", fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)

    asked(tiny, use, ServerSettings(names=("tiny",), max_prompts=4, max_choices=8))


def test_vectors_are_those_of_the_library(tiny: Path) -> None:
    async def use(client: Client) -> None:
        expected = (await client.served.llm.embed(["abc", "de"])).tolist()
        for given in (["abc", "de"], [[97, 98, 99], [100, 101]]):
            answer = (await client.post("/v1/embeddings", {"input": given})).json()
            assert [one["embedding"] for one in answer["data"]] == expected
            assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        body = {"input": "abc", "encoding_format": "base64", "dimensions": 32}
        packed = (await client.post("/v1/embeddings", body)).json()["data"][0]["embedding"]
        assert array("f", base64.b64decode(packed)).tolist() == expected[0]
        mean = (await client.served.llm.embed(["abc"], pooling="mean", normalize=False)).tolist()
        body = {"input": [97, 98, 99], "pooling": "mean", "normalize": False}
        answer = (await client.post("/v1/embeddings", body)).json()
        assert answer["data"][0]["embedding"] == mean[0]
        many = (await client.post("/v1/embeddings", {"input": ["abc"] * 40})).json()
        assert [one["index"] for one in many["data"]] == list(range(40))
        for wrong in ({"input": ""}, {"input": ["a", ""]}, {"input": [[]]}, {"input": [999]},
                      {"input": "a", "dimensions": 8}, {"input": ["a"] * 2049}):  # fmt: skip
            assert (await client.post("/v1/embeddings", wrong)).status_code == 400, str(wrong)[:60]
        late = await client.post("/v1/embeddings", {"input": "abc", "timeout_s": 5e-324})
        assert (late.status_code, late.json()["error"]["param"]) == (400, "timeout_s")

    asked(tiny, use)


def test_tokens_and_back(tiny: Path) -> None:
    async def use(client: Client) -> None:
        plain = (await client.post("/tokenize", {"prompt": "a<|im_end|>"})).json()
        assert plain["tokens"] == list(b"a<|im_end|>")  # no text becomes a control token
        assert plain["max_model_len"] == 4096
        body = {"messages": HELLO, "return_token_strs": True}
        chat = (await client.post("/tokenize", body)).json()
        assert chat["count"] == len(chat["tokens"]) == len(chat["token_strs"]) == 24
        assert chat["token_strs"][0] == "<|im_start|>"
        text = (await client.post("/detokenize", {"tokens": chat["tokens"]})).json()["prompt"]
        assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        empty = await client.post("/tokenize", {"prompt": ""})
        assert empty.json()["tokens"] == []
        for wrong in ({}, {"prompt": "a", "messages": HELLO}):
            assert (await client.post("/tokenize", wrong)).status_code == 400
        for ids in ([-1], [464], [1.5], "a"):
            assert (await client.post("/detokenize", {"tokens": ids})).status_code == 400

    asked(tiny, use)
