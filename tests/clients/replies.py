"""What the model says in the conversations of the client tests: a text for a prompt's text."""

from __future__ import annotations

import json

QUESTION = "What is the weather in Paris?"
RESULT = "Paris: 18 degrees, sunny"
ANSWER = "It is 18 degrees and sunny in Paris."
GREETING = "Hello! How can I help you today?"
CITY: dict[str, object] = {"name": "Paris", "country": "France"}
TWO_CITIES = "What is the weather in Paris, and what is it in Rome?"
MADE_UP = "Paris: 40 degrees, snow"  # what a model writes on if nobody stops it


def reply(prompt: str) -> str:
    """Decided by the prompt alone, so that clients may ask in any order, together, and again."""
    told = RESULT in prompt
    if "Which city has the Eiffel Tower?" in prompt:
        return call("City", CITY) if "A city as a record." in prompt else json.dumps(CITY)
    if "Who is Jay Chou?" in prompt:
        if "A singer from Taiwan." in prompt:
            return answer(prompt, "Jay Chou is a singer from Taiwan.")
        return call_as_asked(prompt, "google_search", {"search_query": "Jay Chou"})
    if TWO_CITIES in prompt:
        both = [("get_weather", {"city": city}) for city in ("Paris", "Rome")]
        return calls_as_asked(prompt, both)
    if QUESTION not in prompt:
        return GREETING
    for mark, own_words in OWN_WORDS.items():
        if mark in prompt:
            return own_words(told)
    if "final_answer" in prompt and told:  # smolagents: an answer is a call as well
        return call_as_asked(prompt, "final_answer", {"answer": ANSWER})
    if told:
        return answer(prompt, ANSWER)
    if "get_current_weather" in prompt:
        return call_as_asked(prompt, "get_current_weather", {"location": "Paris"})
    return call_as_asked(prompt, "get_weather", {"city": "Paris"})


# -- the server's dialects ------------------------------------------------------------------------


Call = tuple[str, dict[str, object]]


def call_as_asked(prompt: str, name: str, arguments: dict[str, object]) -> str:
    """A call in the form that the prompt asks for."""
    return calls_as_asked(prompt, [(name, arguments)])


def calls_as_asked(prompt: str, wanted: list[Call]) -> str:
    """Calls in the form that the prompt asks for; ReAct has one at a time."""
    if "You have access to the following APIs:" in prompt:
        name, arguments = wanted[0]
        thought = f"Thought: I should use {name}.\nAction: {name}\n"
        return f"{thought}Action Input: {json.dumps(arguments)}\nObservation: {MADE_UP}"
    if "✿FUNCTION✿" in prompt:
        lines = [f"✿FUNCTION✿: {name}\n✿ARGS✿: {json.dumps(given)}\n" for name, given in wanted]
        text = f"{''.join(lines)}✿RESULT✿: {MADE_UP}"
        begun = f"✿FUNCTION✿: {wanted[0][0]}"  # in the prompt already, if this tool must be called
        return text.removeprefix(begun) if prompt.endswith(begun) else text
    return "\n".join(call(name, arguments) for name, arguments in wanted)


def call(name: str, arguments: dict[str, object]) -> str:
    """A call in the form of Hermes."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def answer(prompt: str, text: str) -> str:
    """An answer where the tool's result has been told."""
    if "You have access to the following APIs:" in prompt:
        return f" I now know the final answer.\nFinal Answer: {text}"
    return f": {text}" if "✿FUNCTION✿" in prompt else text


# -- what libraries ask for in words of their own --------------------------------------------------


def langchain_react(told: bool) -> str:
    """The form of the original's fourth test case, which stops at an observation."""
    if told:
        return f"I now know the final answer\nFinal Answer: {ANSWER}"
    action = "I should look this up.\nAction: get_weather\nAction Input: Paris"
    return f"{action}\nObservation: {MADE_UP}"


def llama_index_react(told: bool) -> str:
    """A form to which no stop words are given."""
    if told:
        return f"Thought: I can answer without using any more tools.\nAnswer: {ANSWER}"
    arguments = json.dumps({"city": "Paris"})
    return f"Thought: I need a tool.\nAction: get_weather\nAction Input: {arguments}"


def smolagents_code(told: bool) -> str:
    """Python between marks."""
    line = f"final_answer({ANSWER!r})" if told else "print(get_weather(city='Paris'))"
    return f"Thought: one line will do.\n<code>\n{line}\n</code>\nObservation: {MADE_UP}"


OWN_WORDS = {
    "> Tool Name: get_weather": llama_index_react,
    "Answer the following questions as best you can. You have access to the following tools:": (
        langchain_react
    ),
    "<code>": smolagents_code,
}
