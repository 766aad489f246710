"""ReAct: Thought, Action, Action Input, Observation; how the first generation calls tools.

A turn of the assistant goes on behind an observation. The prompt is, byte for byte, that of the
first generation's openai_api.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from qwenkit.chat.dialects.spec import Conversation, Dialect, Written
from qwenkit.chat.grammar import CallGrammar, Calls, literal
from qwenkit.chat.parse import read_arguments
from qwenkit.chat.tape import Steps, Tape
from qwenkit.errors import RequestError
from qwenkit.types.messages import Message, Tool

_INSTRUCTION = """Answer the following questions as best you can. You have access to the following \
APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_FORMATS = {
    "json": "Format the arguments as a JSON object.",
    "code": "Enclose the code within triple backticks (`) at the beginning and end of the code.",
}
STOP = "Observation:"
_THOUGHT, _ACTION, _FINAL = "Thought:", "\nAction:", "\nFinal Answer:"
_INPUT = "Action Input:"
_ENDS = ("\nObservation:", "\nThought:", _ACTION, _FINAL)
_LONGEST_NAME = 256
_SPACES = re.compile(r"\s*")


# -- writing -------------------------------------------------------------------------------------


def write(conversation: Conversation) -> Written:
    """One user's and one assistant's message a turn, the instruction in the last finished turn or,
    if there is none, in the question.

    Raises RequestError with the words of the original server where roles do not follow each other.
    """
    given = conversation.messages
    system = given[:1] if given[0].role == "system" else ()
    if all(message.role != "user" for message in given):
        raise RequestError("messages", "Expecting at least one user message.")
    messages = _turns(conversation, len(system))
    goes_on = given[-1].role == "tool"
    start = _THOUGHT if goes_on else _FINAL if conversation.continues else None
    pairs = messages[: len(messages) // 2 * 2]
    for i, message in enumerate(messages):
        if message.role != ("user", "assistant")[i % 2]:
            raise RequestError(
                "messages",
                "Expecting exactly one user (or function) role before every assistant role.",
            )
    if conversation.tools:
        at = max(len(pairs) - 2, 0)
        question = f"{_instruction(conversation.tools)}\n\nQuestion: {messages[at].content}"
        messages[at] = replace(messages[at], content=question)
    return Written(messages=(*map(_stripped, system), *messages), reply_start=start)


def _turns(conversation: Conversation, first: int) -> list[Message]:
    """The messages behind the system's, with calls and results in the assistant's text."""
    messages: list[Message] = []
    last = len(conversation.messages) - 1
    for i, message in enumerate(conversation.messages[first:], first):
        message = _stripped(message)
        if message.role == "system":
            raise RequestError(f"messages[{i}]", "Incorrect role system.")
        if message.role == "user":
            messages.append(message)
        elif message.role == "tool":
            if not messages or messages[-1].role != "assistant":
                field = f"messages[{i}]"
                raise RequestError(field, "Expecting role assistant before role function.")
            thought = f"\n{_THOUGHT}" if i == last else ""
            content = f"{messages[-1].content}\n{STOP} {message.content}{thought}"
            messages[-1] = replace(messages[-1], content=content)
        else:
            if not messages:
                field = f"messages[{i}]"
                raise RequestError(field, "Expecting role user before role assistant.")
            content = _said(message, with_tools=bool(conversation.tools))
            if messages[-1].role == "user":
                messages.append(replace(message, content=content, tool_calls=()))
            else:
                joined = f"{messages[-1].content}\n{content}"
                messages[-1] = replace(messages[-1], content=joined)
    return list(map(_stripped, messages))


def _said(message: Message, *, with_tools: bool) -> str:
    """What the assistant said, in the words of the format."""
    content = message.content
    if not message.tool_calls:
        final = f"{_THOUGHT} I now know the final answer.{_FINAL} {content}"
        return final if with_tools else content
    if not content.startswith(_THOUGHT):
        content = f"{_THOUGHT} {content}"
    for call in message.tool_calls:
        content += f"{_ACTION} {call.name}\n{_INPUT} {call.arguments}"
    return content


def _stripped(message: Message) -> Message:
    return replace(message, content=message.content.lstrip("\n").rstrip())


def _instruction(tools: tuple[Tool, ...]) -> str:
    return _INSTRUCTION.format(
        tools="\n\n".join(map(_described, tools)), names=", ".join(tool.name for tool in tools)
    )


def _described(tool: Tool) -> str:
    shown = tool.parameters if tool.shown_parameters is None else tool.shown_parameters
    title = tool.title or tool.name
    line = (
        f"{tool.name}: Call this tool to interact with the {title} API. What is the {title} API "
        f"useful for? {tool.description} Parameters: {json.dumps(shown, ensure_ascii=False)}"
    )
    if tool.args_format is None:
        return line
    return f"{line} {_FORMATS.get(tool.args_format, tool.args_format)}"


# -- reading -------------------------------------------------------------------------------------


def read(tape: Tape) -> Steps[None]:
    """A thought, then actions or the final answer; or text in no format.

    The thought is held back until it is known what it leads to: in front of an action it is the
    reply's text, in front of the final answer it was a thought.
    """
    if tape.start.endswith(_THOUGHT):
        yield from _thought(tape, "")
    elif tape.tools and not tape.start.strip():
        space = yield from tape.skip(_SPACES)
        if (yield from tape.expect(_THOUGHT)):
            yield from _thought(tape, space + _THOUGHT)
        elif (yield from tape.expect(_ACTION[1:])):
            yield from _action(tape, space + _ACTION[1:])
        else:
            tape.put_back(space)
    while (mark := (yield from tape.until(_actions(tape), tape.say))) is not None:
        yield from _action(tape, mark)


def _actions(tape: Tape) -> tuple[str, ...]:
    return (_ACTION,) if tape.may_call else ()


def _thought(tape: Tape, mark: str) -> Steps[None]:
    """A thought behind its mark, and what it leads to."""
    taken: list[str] = []
    end = yield from tape.until((*_actions(tape), _FINAL), taken.append)
    written = "".join(taken)
    if end == _FINAL:
        tape.think(written.strip())
        yield from tape.expect(" ")
    elif end is None:
        tape.say(mark + written)
    else:
        tape.lead = written.strip()
        yield from _action(tape, mark + written + end)
        tape.lead = ""


def _action(tape: Tape, mark: str) -> Steps[None]:
    """A call behind its mark, or the same as text where there is none."""
    taken: list[str] = []
    line_break = yield from tape.until(("\n",), taken.append)
    written = "".join(taken)
    name = tape.known_name(written.strip(" \t\r`\"'"))
    before = mark + written + (line_break or "") + (yield from tape.skip(_SPACES))
    is_name = 0 < len(name) <= _LONGEST_NAME
    if is_name and (yield from tape.expect(_INPUT)):
        unread = yield from read_arguments(tape, name, _ENDS)
        if unread is not None:
            tape.say(before + _INPUT + unread)
        return
    ended = (yield from tape.ended()) and not tape.cut_off
    if ended and name in tape.tools and not tape.schema(name).get("required"):
        tape.whole_call(name, "{}", repaired=True)
    else:
        tape.say(before)


def calls(grammar: CallGrammar) -> Calls:
    """A thought of one line, then one action."""
    thought = "" if grammar.start.endswith(_THOUGHT) else literal(_THOUGHT)
    end = f"({literal(_ENDS[0])})?"
    return Calls(
        must=f"must_call: {thought} /[^\\n]+/ {literal(_ACTION)} body {end}",
        may=f"may_call: opened body {end} | REST",
        rules=(
            *grammar.bodies(f" {{name}}\n{_INPUT} ", ""),
            grammar.until("opened", _ACTION),
            grammar.without("REST", _ACTION),
        ),
    )


DIALECT = Dialect(name="react", write=write, read=read, calls=calls, stops=(STOP,))
