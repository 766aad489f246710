"""The hundred hostile requests that every endpoint of a server must outlive.

Each is a path and a body, or bytes. What they are taken from: faults of other servers, as issues
and advisories tell of them.
"""

from __future__ import annotations

import json
from typing import Any

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> tuple[str, Any]:
    return "/v1/chat/completions", {"messages": HELLO, "max_tokens": 4, **fields}


def complete(prompt: Any = "Hello", **fields: Any) -> tuple[str, Any]:
    return "/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields}


def deep(case: tuple[str, Any], levels: int = 900) -> tuple[str, bytes]:
    """The same with a schema of so many levels in the place of "DEEP"."""
    path, body = case
    opening = '{"type": "object", "properties": {"a": '
    schema = opening * levels + '{"type": "object"}' + "}}" * levels
    return path, json.dumps(body).replace('"DEEP"', schema).encode()


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


CASES: list[tuple[str, Any]] = [
    *(chat(logit_bias=bias) for bias in ({"999999": 1}, {"-1": 1}, {"a": 1}, {"1": 1e308})),
    chat(logit_bias={str(i): 1 for i in range(100_000)}),
    *(chat(n=n) for n in (0, -1, 10_000, 1_000_000)),
    *(chat(max_tokens=count, timeout_s=0.2) for count in (-1, 0, 10**18, "many")),
    complete(echo=True, max_tokens=0),
    *(chat(temperature=value) for value in (-1, 1e300, 1e-300, "hot")),
    *(chat(top_p=value) for value in (0, 2)),
    *(chat(top_k=value) for value in (-9, 10**12)),
    chat(min_p=5),
    *(chat(repetition_penalty=value) for value in (0, -1, 1e30)),
    chat(frequency_penalty=1e9),
    *(chat(seed=seed) for seed in (2**70, -1)),
    *(chat(logprobs=True, top_logprobs=count) for count in (100_000, -3)),
    complete(logprobs=99_999),
    complete(prompt_logprobs=99_999),
    *(chat(messages=messages) for messages in ([], None, "hi")),
    *(
        chat(messages=[message])
        for message in ({"role": "bogus", "content": "a"}, {"content": "a"})
    ),
    *(chat(messages=[{"role": "user", "content": content}]) for content in (None, 5)),
    *(
        chat(
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
            ]
        )
        for url in ("http://169.254.169.254/latest", "file:///etc/passwd")
    ),
    *(complete(prompt) for prompt in ("", [], [""], [10**9], [-5], [[]], ["a"] * 5000)),
    complete(best_of=1_000_000),
    complete("a" * 100_000),
    complete("a" * (4 << 20)),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    chat(messages=[{"role": "user", "content": "a\0b"}]),
    *(
        ("/v1/chat/completions", body)
        for body in (b"{", b"", b"[]", b'{"temperature": NaN}', b'{"temperature": 1e999}')
    ),
    ("/v1/chat/completions", b"[" * 200_000),
    *(chat(stop=stop) for stop in ("", ["a", ""], ["a"] * 10_000)),
    chat(stop_token_ids=[10**9]),
    chat(bad_words=["a"]),
    *(chat(allowed_token_ids=ids) for ids in ([10**9], [470], [])),
    chat(min_tokens=9, max_tokens=4),
    *(chat(tools=[{"type": kind}]) for kind in ("bogus", "function")),
    chat(tools=[tool({"type": "object", "properties": {"a": {"pattern": "("}}})]),
    chat(tools=[tool({"type": "wrong"})]),
    chat(tools=[tool({})], tool_choice={"type": "function", "function": {"name": "missing"}}),
    deep(chat(tools=[tool("DEEP")])),
    chat(response_format=schema({"type": 5})),
    chat(response_format={"type": "json_schema"}),
    chat(response_format={"type": "bogus"}),
    *(chat(guided_regex=regex) for regex in ("(a+)+b", "((a{1,500}){1,500}){1,500}", "(")),
    chat(guided_grammar="root ::= root"),
    chat(guided_choice=[]),
    deep(chat(guided_json="DEEP")),
    *(
        chat(chat_template=template)
        for template in (
            "{% for i in range(1000000000) %}{% endfor %}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% if %}",
        )
    ),
    chat(chat_template_kwargs={"range": "x" * 1000}),
    *(chat(model=model) for model in (None, "../../etc/passwd", 5)),
    chat(stream_options={"include_usage": "maybe"}),
    chat(priority=1e30),
    chat(cache_salt=""),
    chat(add_generation_prompt=True, continue_final_message=True),
    complete(truncate_prompt_tokens=-1),
    chat(unknown_field=1),
    ("/v1/../v1/chat/completions", {"messages": HELLO}),
    ("/v1/embeddings", {"input": [[]]}),
    ("/v1/embeddings", {"input": "a" * 100_000}),
    ("/v1/responses", {"input": []}),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {"tokens": [-1]}),
    ("/api/chat", {"model": "default", "messages": [{"role": "user", "images": ["x"]}]}),
    ("/api/generate", {"model": "default", "prompt": "a", "options": {"num_predict": -9}}),
]
