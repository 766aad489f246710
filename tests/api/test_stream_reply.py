"""`stream_reply` and the reply of a chat: renderer, engine, parser and stream together, the tokens
put in at the sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenkit import LLM, AsyncLLM
from qwenkit.api.replies import ReplyEvent
from qwenkit.chat.parse import ReplyCollector
from qwenkit.errors import RequestError
from qwenkit.types.completion import Reply, ReplyCall
from qwenkit.types.deltas import CallArguments, CallEnd, CallStart, ContentDelta
from qwenkit.types.events import FinishEvent
from scripted_server import script_of, scripted
from tiny import write_tiny_checkpoint

WEATHER = {
    "name": "get_weather",
    "description": "Weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
ASK = [{"role": "user", "content": "Weather in Paris?"}]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
SCRIPT = script_of(
    [
        (
            "Question:",
            f"Thought: a\nAction: get_weather\nAction Input: {PARIS}\nObservation: never",
        ),
        ("now!", "Sunny."),
        ("Weather", f"Well.\n{CALL}"),
    ]
)
EXPECTED = Reply("Well.", tool_calls=(ReplyCall("get_weather", PARIS),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"max_position_embeddings": 4096}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), config=config)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm, scripted(llm, SCRIPT):
        yield llm


def collected(events: list[ReplyEvent]) -> Reply:
    collector = ReplyCollector()
    for event in events:
        collector.add(event.deltas)
    return collector.reply()


OPTIONS: dict[str, Any] = {"tools": TOOLS, "tool_options": {"dialect": "hermes"}}


def test_a_reply_comes_in_deltas(llm: LLM) -> None:
    events = list(llm.stream_reply(ASK, **OPTIONS))
    assert collected(events) == EXPECTED
    deltas = [delta for event in events for delta in event.deltas]
    assert isinstance(deltas[0], ContentDelta)
    assert CallStart(0, "get_weather") in deltas
    assert deltas[-1] == CallEnd(0, PARIS)
    assert sum(isinstance(delta, CallArguments) for delta in deltas) > 5
    assert [isinstance(e.event, FinishEvent) for e in events] == [False] * (len(events) - 1) + [
        True
    ]
    completion = llm.chat(ASK, **OPTIONS)
    assert completion.reply == EXPECTED
    assert completion.text == f"Well.\n{CALL}"
    assert "".join(e.text for e in llm.stream_chat(ASK, tools=TOOLS)) == completion.text
    assert llm.generate("Weather").reply is None


def test_the_async_stream_is_the_same(folder: Path) -> None:
    async def ask() -> tuple[Reply, Reply | None]:
        async with AsyncLLM(folder) as model:
            with scripted(model, SCRIPT):
                events = [event async for event in model.stream_reply(ASK, **OPTIONS)]
                done = await model.chat(ASK, **OPTIONS)
        return collected(events), done.reply

    assert asyncio.run(ask()) == (EXPECTED, EXPECTED)


def test_a_conversation_goes_on_with_the_result(llm: LLM) -> None:
    reply = llm.chat(ASK, **OPTIONS).reply
    assert reply is not None
    (call,) = reply.tool_calls
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": reply.content,
            "function_call": {"name": call.name, "arguments": call.arguments},
        },
        {"role": "function", "name": call.name, "content": "now!"},
    ]
    for name in ("hermes", "qwen_fn", "qwen_xml"):
        done = llm.chat(messages, tools=TOOLS, tool_options={"dialect": name})
        assert done.reply == Reply("Sunny.")


def test_the_dialects_stop_ends_a_reply(llm: LLM) -> None:
    done = llm.chat(ASK, {"stop": ["never"]}, tools=TOOLS, tool_options={"dialect": "react"})
    assert (done.finish_reason, done.matched_stop) == ("stop", "Observation:")
    assert done.reply == Reply("a", tool_calls=EXPECTED.tool_calls)


@pytest.mark.parametrize("sampling", [{"max_tokens": 60}, {"stop": ["aris"]}])
def test_a_reply_that_is_cut_off_has_a_call_that_is_not_complete(
    llm: LLM, sampling: dict[str, Any]
) -> None:
    done = llm.chat(ASK, sampling, **OPTIONS)
    assert done.reply is not None
    (call,) = done.reply.tool_calls
    assert not call.complete
    assert PARIS.startswith(call.arguments)
    assert collected(list(llm.stream_reply(ASK, sampling, **OPTIONS))) == done.reply


def test_several_choices_have_a_reader_each(llm: LLM) -> None:
    prepared = llm.prepare_reply(ASK, {"seed": 5, "max_tokens": 200}, **OPTIONS)
    requests = prepared.requests(3)
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    assert len({request.id for request in requests}) == 3
    assert prepared.request.sampling.stop == ()
    first, second = prepared.reader(), prepared.reader()
    events = list(llm.stream_chat(ASK, tools=TOOLS))
    assert [first.read(e).deltas for e in events] == [second.read(e).deltas for e in events]


def test_a_call_that_must_come_is_a_constraint_of_the_request(llm: LLM) -> None:
    for choice in ("required", "get_weather"):
        options = {"dialect": "hermes", "choice": choice}
        prepared = llm.prepare_reply(ASK, tools=TOOLS, tool_options=options)
        assert prepared.request.sampling.constraint is not None
    assert llm.prepare_reply(ASK, **OPTIONS).request.sampling.constraint is None
    strict = [{**TOOLS[0], "function": {**WEATHER, "strict": True}}]
    assert llm.prepare_reply(ASK, tools=strict).request.sampling.constraint is not None


def test_options_are_checked_by_name(llm: LLM) -> None:
    for options, message in (
        ({"choise": "auto"}, r"tool_options: 'choise' is unknown.*choice"),
        ({"choice": "f"}, r"tool_options.choice: got 'f'. Allowed: get_weather"),
        ({"choice": 1}, r"tool_options.choice: got 1"),
        ({"parallel": 1}, r"tool_options.parallel: expected a bool"),
        ({"language": "fr"}, r"tool_options.language: got 'fr'"),
        ({"dialect": "xml"}, r"tool_options.dialect: got 'xml'"),
        ({"dialect": 3}, r"tool_options.dialect: expected a name"),
        ("auto", r"tool_options: expected ToolOptions or a mapping, got str"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.prepare_reply(ASK, tools=TOOLS, tool_options=options)  # type: ignore[arg-type]
