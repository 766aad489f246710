"""LangChain: an agent of today, streams, a class as the answer, and the ReAct agent of 2023."""

from __future__ import annotations

from typing import Any

from langchain_classic.agents import AgentType, initialize_agent
from langchain_core.tools import Tool
from pydantic import BaseModel
from replies import ANSWER, CITY, QUESTION, RESULT


class City(BaseModel):
    name: str
    country: str


def check(shown: dict[str, Any], url: str) -> None:
    asked, called, told, answer = shown["result"]["messages"]
    assert asked.content == QUESTION
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert called.response_metadata["finish_reason"] == "tool_calls"
    assert (told.content, told.tool_call_id) == (RESULT, call["id"])
    assert (answer.content, answer.response_metadata["finish_reason"]) == (ANSWER, "stop")
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    check_stream(shown)
    check_class(shown["model"])
    check_react(shown["model"])


def check_stream(shown: dict[str, Any]) -> None:
    """The chunks of the model, added up, and the agent's own stream of them."""
    bound = shown["model"].bind_tools([shown["get_weather"]])
    whole = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert whole.usage_metadata["total_tokens"] > 0
    question = {"messages": [{"role": "user", "content": QUESTION}]}
    parts = [
        chunk.content
        for chunk, where in shown["agent"].stream(question, stream_mode="messages")
        if where["langgraph_node"] == "model"
    ]
    assert "".join(parts) == ANSWER


def check_class(model: Any) -> None:
    city = model.with_structured_output(City).invoke("Which city has the Eiffel Tower?")
    assert city == City(**CITY)


def check_react(model: Any) -> None:
    """The original's fourth test case: ZERO_SHOT_REACT_DESCRIPTION, with a stop at Observation."""
    asked: list[str] = []

    def look(city: str) -> str:
        asked.append(city)
        return RESULT

    tool = Tool(name="get_weather", func=look, description="The weather in a city.")
    agent = initialize_agent([tool], model, agent=AgentType.ZERO_SHOT_REACT_DESCRIPTION)
    assert agent.invoke({"input": QUESTION})["output"] == ANSWER
    assert [word.strip() for word in asked] == ["Paris"]
