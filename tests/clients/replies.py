"""What the model says in the conversations of the client tests: a text for a prompt's text."""

from __future__ import annotations

import json

QUESTION = "What is the weather in Paris?"
RESULT = "Paris: 18 degrees, sunny"
ANSWER = "It is 18 degrees and sunny in Paris."
GREETING = "Hello! How can I help you today?"
CITY: dict[str, object] = {"name": "Paris", "country": "France"}
MADE_UP = "Paris: 40 degrees, snow"  # what a model writes on if nobody stops it


def reply(prompt: str) -> str:
    """Decided by the prompt alone, so that clients may ask in any order, together, and again."""
    told = RESULT in prompt
    if "Which city has the Eiffel Tower?" in prompt:
        return call("City", CITY) if "A city as a record." in prompt else json.dumps(CITY)
    if "Who is Jay Chou?" in prompt:
        looked_up = "A singer from Taiwan." in prompt
        called = call("google_search", {"search_query": "Jay Chou"})
        return "Jay Chou is a singer from Taiwan." if looked_up else called
    if QUESTION not in prompt:
        return GREETING
    if "> Tool Name: get_weather" in prompt:
        return llama_index_react(told=told)
    if "Action Input:" in prompt:
        return react(told=told)
    if "✿FUNCTION✿" in prompt:
        return f": {ANSWER}" if told else qwen2_call("get_weather", {"city": "Paris"})
    if "<code>" in prompt:
        return code(told=told)
    if "final_answer" in prompt and told:  # smolagents: an answer is a call as well
        return call("final_answer", {"answer": ANSWER})
    if told:
        return ANSWER
    if "get_current_weather" in prompt:
        return call("get_current_weather", {"location": "Paris"})
    return call("get_weather", {"city": "Paris"})


def call(name: str, arguments: dict[str, object]) -> str:
    """A call in the form of Hermes."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def qwen2_call(name: str, arguments: dict[str, object]) -> str:
    """A call in the form of Qwen2's first template."""
    return f"✿FUNCTION✿: {name}\n✿ARGS✿: {json.dumps(arguments)}\n✿RESULT✿: {MADE_UP}"


def code(*, told: bool) -> str:
    """What smolagents' agent that writes Python is asked for."""
    line = f"final_answer({ANSWER!r})" if told else "print(get_weather(city='Paris'))"
    return f"Thought: one line will do.\n<code>\n{line}\n</code>\nObservation: {MADE_UP}"


def llama_index_react(*, told: bool) -> str:
    """LlamaIndex's own form, to which it gives no stop words."""
    if told:
        return f"Thought: I can answer without using any more tools.\nAnswer: {ANSWER}"
    arguments = json.dumps({"city": "Paris"})
    return f"Thought: I need a tool.\nAction: get_weather\nAction Input: {arguments}"


def react(*, told: bool) -> str:
    """The form of the original and of LangChain's first agents, which stop at an observation."""
    if told:
        return f"I now know the final answer\nFinal Answer: {ANSWER}"
    action = "I should look this up.\nAction: get_weather\nAction Input: Paris"
    return f"{action}\nObservation: {MADE_UP}"
