"""smolagents: the agent that calls tools, at once and streamed, and the one that writes code."""

from __future__ import annotations

from typing import Any

from replies import ANSWER, QUESTION, RESULT
from smolagents import CodeAgent, ToolCallingAgent
from smolagents.memory import ActionStep


def check(shown: dict[str, Any], url: str) -> None:
    assert shown["answer"] == ANSWER
    check_steps(shown["agent"])
    for step in steps_of(shown["agent"]):  # it would also look for calls in the text by itself
        (choice,) = step.model_output_message.raw.choices
        assert choice.finish_reason == "tool_calls"
    streamed = ToolCallingAgent(
        tools=[shown["get_weather"]], model=shown["model"], stream_outputs=True
    )
    assert streamed.run(QUESTION) == ANSWER
    check_steps(streamed)
    writer = CodeAgent(tools=[shown["get_weather"]], model=shown["model"])
    assert writer.run(QUESTION) == ANSWER


def steps_of(agent: Any) -> list[ActionStep]:
    return [step for step in agent.memory.steps if isinstance(step, ActionStep)]


def check_steps(agent: Any) -> None:
    asked, told = steps_of(agent)
    (call,) = asked.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert asked.observations == RESULT
    (call,) = told.tool_calls
    assert (call.name, call.arguments) == ("final_answer", {"answer": ANSWER})
    usage = told.token_usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
