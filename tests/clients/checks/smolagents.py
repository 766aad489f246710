"""smolagents: the agent that calls tools, step by step and streamed, and the one that writes code."""

from __future__ import annotations

from typing import Any

from replies import ANSWER, QUESTION, RESULT
from smolagents import CodeAgent, ToolCallingAgent
from smolagents.memory import ActionStep


def check(shown: dict[str, Any], url: str) -> None:
    assert shown["answer"] == ANSWER
    check_steps(shown["agent"])
    streamed = ToolCallingAgent(
        tools=[shown["get_weather"]], model=shown["model"], stream_outputs=True
    )
    assert streamed.run(QUESTION) == ANSWER
    check_steps(streamed)
    writer = CodeAgent(tools=[shown["get_weather"]], model=shown["model"])
    assert writer.run(QUESTION) == ANSWER


def check_steps(agent: Any) -> None:
    asked, told = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    (call,) = asked.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert asked.observations == RESULT
    (call,) = told.tool_calls
    assert (call.name, call.arguments) == ("final_answer", {"answer": ANSWER})
    usage = told.token_usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
