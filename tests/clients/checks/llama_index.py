"""LlamaIndex: the function agent with its events, the model alone, a class, and its ReAct agent."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.agent.workflow import AgentStream, ReActAgent, ToolCall, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from replies import ANSWER, CITY, GREETING, QUESTION, RESULT


class City(BaseModel):
    """A city as a record."""

    name: str
    country: str


def check(shown: dict[str, Any], url: str) -> None:
    assert shown["answer"] == ANSWER
    asyncio.run(check_events(shown["agent"]))
    check_model(shown["model"], shown["get_weather"])
    agent = ReActAgent(tools=[shown["get_weather"]], llm=shown["model"])
    asyncio.run(check_events(agent))


async def check_events(agent: Any) -> None:
    """One call, its result, and the answer, which its pieces add up to."""
    running = agent.run(QUESTION)
    events = [event async for event in running.stream_events()]
    assert str(await running) == ANSWER
    (call,) = [event for event in events if type(event) is ToolCall]
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert str(result.tool_output) == RESULT
    pieces = [event.delta for event in events if isinstance(event, AgentStream) and event.delta]
    assert "".join(pieces).endswith(ANSWER)


def check_model(model: Any, get_weather: Any) -> None:
    hello = [ChatMessage(role="user", content="Hello!")]
    assert model.chat(hello).message.content == GREETING
    assert "".join(part.delta for part in model.stream_chat(hello)) == GREETING
    tool = FunctionTool.from_defaults(get_weather)
    told = model.chat_with_tools([tool], user_msg=QUESTION)
    (call,) = model.get_tool_calls_from_response(told)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
    city = model.as_structured_llm(City).complete("Which city has the Eiffel Tower?")
    assert city.raw == City(**CITY)
