"""The hundred hostile requests, one by one, as data.

Each says which field a refusal must name. What cannot be honoured must be refused; `may_serve` is
said of what a server may also answer properly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qwenkit.bench.reliability.model import CONTEXT_TOKENS, LOGITS
from qwenkit.bench.reliability.wire import CHAT, COMPLETIONS, Content, Wire

_PAST = 10 * LOGITS  # an id that no vocabulary has
_PADDING = LOGITS - 1  # a row of the head that stands for no token
_USER = {"role": "user", "content": "Say a word."}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """One of the hundred. `names`: a refusal names one of these; empty where no field is at fault.
    `is_http`: the fault lies below JSON, where the web server itself may answer in plain text.
    """

    name: str
    wire: Wire
    names: tuple[str, ...] = ()
    may_serve: bool = False
    is_http: bool = False


def deep_schema(levels: int) -> dict[str, Any]:
    """Arrays of arrays."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def _chat(name: str, *names: str, may_serve: bool = False, **fields: Any) -> Hostile:
    content = {"model": "default", "messages": [_USER], "max_tokens": 8} | fields
    wire = Wire(path=CHAT, content=content)
    return Hostile(name=name, wire=wire, names=names or tuple(fields), may_serve=may_serve)


def _text(name: str, *names: str, may_serve: bool = False, **fields: Any) -> Hostile:
    content = {"model": "default", "prompt": "Say a word.", "max_tokens": 8} | fields
    wire = Wire(path=COMPLETIONS, content=content)
    return Hostile(name=name, wire=wire, names=names or tuple(fields), may_serve=may_serve)


def _large(name: str, field: str, content: Content, *, path: str = COMPLETIONS) -> Hostile:
    return Hostile(name=name, wire=Wire(path=path, content=content), names=(field,))


def _bytes(name: str, body: bytes, *, may_serve: bool = False) -> Hostile:
    return Hostile(name=name, wire=Wire(path=CHAT, content=body), may_serve=may_serve)


def _said(text: str) -> bytes:
    """A chat request whose message is JSON text as it stands."""
    return b'{"model":"default","max_tokens":8,"messages":[{"role":"user","content":' + (
        text.encode("utf-8", "surrogatepass") + b"}]}"
    )


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": "Say a word.", "max_tokens": 8} | fields


def _tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": _TOOL["function"] | function}]


def _parameter(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return _tool(parameters={"type": "object", "properties": {"a": schema}})


HOSTILE: tuple[Hostile, ...] = (
    # logit_bias
    _text("bias of an id past the vocabulary", logit_bias={str(_PAST): 1.0}),
    _text("bias of a negative id", logit_bias={"-1": 1.0}),
    _text("bias of a word", logit_bias={"word": 1.0}),
    _text("bias of 1e308", logit_bias={"100": 1e308}),
    _large(
        "bias of 100,000 ids",
        "logit_bias",
        lambda: _completion(logit_bias={str(i): 1.0 for i in range(100_000)}),
    ),
    # n
    _text("n 0", n=0),
    _text("n -1", n=-1),
    _text("n 10,000", n=10_000),
    _text("n 1,000,000", n=1_000_000),
    # max_tokens
    _text("max_tokens -1", max_tokens=-1),
    _text("max_tokens 0", may_serve=True, max_tokens=0),
    _text("max_tokens 1e18", "max_tokens", "context", may_serve=True, max_tokens=10**18),
    _text("max_tokens as text", max_tokens="many"),
    _text("echo of nothing new", "echo", "max_tokens", may_serve=True, echo=True, max_tokens=0),
    # temperature
    _text("temperature -1", temperature=-1),
    _text("temperature 1e300", temperature=1e300),
    _text("temperature 1e-300", may_serve=True, temperature=1e-300),
    _text("temperature as text", temperature="hot"),
    # filters
    _text("top_p 0", may_serve=True, top_p=0),
    _text("top_p 2", top_p=2),
    _text("top_k -9", top_k=-9),
    _text("top_k 1e12", may_serve=True, top_k=10**12),
    _text("min_p 5", min_p=5),
    # penalties
    _text("repetition_penalty 0", repetition_penalty=0),
    _text("repetition_penalty -1", repetition_penalty=-1),
    _text("repetition_penalty 1e30", repetition_penalty=1e30),
    _text("frequency_penalty 1e9", frequency_penalty=1e9),
    # seed
    _text("seed 2^70", may_serve=True, seed=2**70),
    _text("seed -1", may_serve=True, seed=-1),
    # log-probabilities
    _chat("top_logprobs 100,000", logprobs=True, top_logprobs=100_000),
    _chat("top_logprobs -3", logprobs=True, top_logprobs=-3),
    _text("logprobs 99,999", logprobs=99_999),
    _text("prompt_logprobs 99,999", prompt_logprobs=99_999),
    # messages
    _chat("no messages", messages=[]),
    _chat("messages null", messages=None),
    _chat("messages a text", messages="hello"),
    _chat("a bogus role", "role", "messages", messages=[{"role": "wizard", "content": "x"}]),
    _chat("no role", "role", "messages", messages=[{"content": "x"}]),
    _chat("content null", "content", "messages", messages=[{"role": "user", "content": None}]),
    _chat("content a number", "content", "messages", messages=[{"role": "user", "content": 7}]),
    _chat(
        "an image at the metadata address",
        *("content", "messages", "image_url"),
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": "http://169.254.169.254/latest/meta-data/"},
                    }
                ],
            }
        ],
    ),
    _chat(
        "a file's address",
        *("content", "messages", "image_url"),
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
            }
        ],
    ),
    # prompt
    _text("an empty prompt", may_serve=True, prompt=""),
    _text("an empty list of prompts", prompt=[]),
    _text("a list with an empty prompt", may_serve=True, prompt=["a", ""]),
    _text("prompt ids past the vocabulary", prompt=[_PAST]),
    _text("negative prompt ids", prompt=[-1]),
    _text("an empty list of ids", prompt=[[]]),
    _large("5,000 prompts", "prompt", lambda: _completion(prompt=["a"] * 5_000)),
    _text("best_of 1,000,000", best_of=1_000_000),
    _large(
        "a prompt that is too long",
        "prompt",
        lambda: _completion(prompt=[100] * (CONTEXT_TOKENS + 1)),
    ),
    Hostile(
        name="a prompt of 4 MB",
        wire=Wire(path=COMPLETIONS, content=lambda: _completion(prompt="word " * 800_000)),
    ),
    # bytes
    _bytes("a lone surrogate", _said('"\\ud800"')),
    _bytes("invalid UTF-8", _said('"text"').replace(b"text", b"\xff\xfe")),
    _bytes("NUL in a text", _said('"a\\u0000b"'), may_serve=True),
    _bytes("JSON that is none", b'{"model": "default", "messages": ['),
    _bytes("an empty body", b""),
    _bytes("an array", b"[1, 2, 3]"),
    _bytes("NaN as a number", b'{"model":"default","prompt":"a","temperature":NaN}'),
    _bytes("1e999 as a number", b'{"model":"default","prompt":"a","temperature":1e999}'),
    Hostile(
        name="200,000 nested brackets",
        wire=Wire(path=CHAT, content=lambda: _said("[" * 200_000 + "]" * 200_000)),
    ),
    # stops
    _text("stop empty", may_serve=True, stop=""),
    _text("stop with an empty entry", may_serve=True, stop=["a", ""]),
    _large(
        "10,000 stops",
        "stop",
        lambda: _completion(stop=[f"stop {i}" for i in range(10_000)]),
    ),
    _text("stop ids past the vocabulary", may_serve=True, stop_token_ids=[_PAST]),
    _text("bad_words past the logits", bad_words=["word", chr(0x10FFFF)], may_serve=True),
    _text("allowed ids past the vocabulary", allowed_token_ids=[_PAST]),
    _text("allowed ids in the padding", allowed_token_ids=[_PADDING]),
    _text("no allowed ids", allowed_token_ids=[]),
    _text("min_tokens above max_tokens", "min_tokens", min_tokens=9, max_tokens=8),
    # tools
    _chat("a tool of a bogus type", "tools", tools=[_TOOL | {"type": "spell"}]),
    _chat(
        "a bad pattern in a tool",
        *("tools", "pattern"),
        may_serve=True,
        tools=_parameter({"type": "string", "pattern": "("}),
    ),
    _chat(
        "an unknown type in a tool",
        "tools",
        may_serve=True,
        tools=_parameter({"type": "wizard"}),
    ),
    _chat(
        "the choice of a missing tool",
        "tool_choice",
        tools=[_TOOL],
        tool_choice={"type": "function", "function": {"name": "absent"}},
    ),
    Hostile(
        name="a tool's schema 900 deep",
        wire=Wire(
            content=lambda: {
                "model": "default",
                "messages": [_USER],
                "max_tokens": 8,
                "tools": _parameter(deep_schema(900)),
            }
        ),
    ),
    # response_format
    _chat(
        "a bad schema",
        "response_format",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "wizard"}},
        },
    ),
    _chat("a missing schema", response_format={"type": "json_schema"}),
    _chat("a bogus format", response_format={"type": "poem"}),
    # structured output
    _text("regex (a+)+b", may_serve=True, guided_regex="(a+)+b"),
    _text("regex of nested counts", may_serve=True, guided_regex="((a{1,500}){1,500}){1,500}"),
    _text("regex (", guided_regex="("),
    _text("grammar root ::= root", guided_grammar="root ::= root"),
    _text("no choices", guided_choice=[]),
    Hostile(
        name="a schema 900 deep",
        wire=Wire(
            path=COMPLETIONS,
            content=lambda: _completion(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": deep_schema(900)},
                }
            ),
        ),
    ),
    # template
    _chat(
        "a template that loops",
        chat_template="{% for i in range(1000000000) %}x{% endfor %}",
    ),
    _chat("a template that reaches out", chat_template="{{ raise_exception.__globals__ }}"),
    _chat(
        "a template in its arguments",
        chat_template_kwargs={"chat_template": "{{ messages.__class__ }}", "messages": []},
    ),
    _chat("a template with a mistake", chat_template="{% for %}"),
    # model
    Hostile(
        name="no model",
        wire=Wire(content={"messages": [_USER], "max_tokens": 8}),
        names=("model",),
        may_serve=True,
    ),
    _chat("a path for a model", model="../../../etc/passwd"),
    _chat("a number for a model", model=7),
    # others
    _chat("bad stream_options", stream_options="yes", stream=True),
    _chat("priority 1e30", priority=1e30),
    _chat("an empty cache_salt", may_serve=True, cache_salt=""),
    _chat(
        "continue and generate",
        *("continue_final_message", "add_generation_prompt"),
        continue_final_message=True,
        add_generation_prompt=True,
    ),
    _text("negative truncation", truncate_prompt_tokens=-5),
    _chat("an unknown field", frobnicate=1),
    Hostile(
        name="a header of 200 KB",
        wire=Wire(
            content={"model": "default", "messages": [_USER], "max_tokens": 8},
            headers=(("X-Long", "x" * 200_000),),
        ),
        is_http=True,
    ),
    Hostile(
        name="a dotted path",
        wire=Wire(path="/v1/../../etc/passwd", method="GET"),
        is_http=True,
    ),
    Hostile(
        name="a bogus method",
        wire=Wire(method="FROB", content=json.loads("{}")),
        is_http=True,
    ),
)
