"""<function=…>: calls in XML between <tool_call> and </tool_call>, as Qwen3-Coder and Qwen3.5
write them.

A parameter's value is its text, so that code needs no escapes. What is given out of it is JSON.
Source: the chat templates of Qwen3-Coder-30B-A3B-Instruct and of Qwen3.5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwenkit.chat.dialects.spec import Conversation, Dialect, Written
from qwenkit.chat.grammar import CallGrammar, Calls, json_rule, literal
from qwenkit.chat.json_repair import member, repair_object, takes_text
from qwenkit.chat.json_scan import is_object
from qwenkit.chat.rewrite import rewritten
from qwenkit.chat.tape import Steps, Tape
from qwenkit.errors import RequestError
from qwenkit.types.messages import Tool, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_VALUE_ENDS = (f"\n{_PARAMETER_END}", _PARAMETER_END)
_LIKELY_ENDS = (f"\n{_FUNCTION_END}", f"\n{CLOSE}", _FUNCTION_END, CLOSE)  # of a value never ended
_TEXT_RULES = {"pattern", "format", "minLength", "maxLength", "allOf", "$ref"}
_SPACES = re.compile(r"\s*")
_INSTRUCTION = """# Tools

You have access to the following functions:

<tools>
{tools}
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must \
be nested within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the \
function call, but NOT after
- If there is no function call available, answer the question like normal with your current \
knowledge and do not tell the user about function calls
</IMPORTANT>"""


def is_shown_by(template: str) -> bool:
    """True where a checkpoint's template shows tools and calls in this dialect by itself."""
    return re.search(r"\btools\b", template) is not None and _FUNCTION in template


# -- writing -------------------------------------------------------------------------------------


def write(conversation: Conversation) -> Written:
    """By the template, or else as Qwen3.5's does it without thoughts."""
    if conversation.template is not None and is_shown_by(conversation.template):
        # These templates look into "properties" without asking whether there are any.
        tools = tuple(
            replace(tool, parameters={"type": "object", "properties": {}, **tool.parameters})
            for tool in conversation.tools
        )
        return Written(messages=conversation.messages, tools=tools)
    messages = rewritten(conversation.messages, conversation.tools, _INSTRUCTION, _call)
    return Written(messages=messages)


def _call(call: ToolCall) -> str:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    members = arguments if isinstance(arguments, dict) else {"arguments": call.arguments}
    lines = [OPEN, f"{_FUNCTION}{call.name}>"]
    for name, value in members.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{_PARAMETER}{name}>", text, _PARAMETER_END]
    return "\n".join([*lines, _FUNCTION_END, CLOSE])


# -- reading -------------------------------------------------------------------------------------


class _CallWriter:
    """One call's arguments as they come."""

    def __init__(self, tape: Tape, name: str) -> None:
        self.schema = tape.schema(name)
        self.repaired = False
        self._tape = tape
        self._call = tape.open_call(name)
        self._written: list[str] = []

    def write(self, text: str) -> None:
        """More of the JSON text."""
        self._written.append(text)
        self._tape.write_arguments(self._call, text)

    def begin(self, name: str) -> None:
        """A member's name."""
        lead = ", " if self._written else "{"
        self.write(f"{lead}{json.dumps(name, ensure_ascii=False)}: ")

    def escaped(self, text: str) -> None:
        """More of a text."""
        self.write(json.dumps(text, ensure_ascii=False)[1:-1])

    def close(self) -> None:
        """The call is complete."""
        self.write("}" if self._written else "{}")
        text = "".join(self._written)
        self._tape.close_call(self._call, text, repaired=self.repaired)


def read(tape: Tape) -> Steps[None]:
    """Text, and calls between their marks; the outer ones may be missing."""
    opened = tape.start.rfind(OPEN)
    if opened >= 0 and CLOSE not in tape.start[opened:]:
        tape.put_back(tape.start[opened:])  # a call that the reply goes on with
    while True:
        marks = (OPEN, _FUNCTION) if tape.may_call else ()
        mark = yield from tape.until(marks, tape.say)
        if mark is None:
            return
        before = mark
        if mark == OPEN:
            before += yield from tape.skip(_SPACES)
            if not (yield from tape.expect(_FUNCTION)):
                tape.say(before)
                continue
            before += _FUNCTION
        written, is_ended = yield from _name(tape)
        name = tape.known_name(written.strip())
        if is_ended and name and (mark == OPEN or name in tape.tools):
            yield from _parameters(tape, _CallWriter(tape, name))
        else:
            tape.say(before + written + (">" if is_ended else ""))


def _name(tape: Tape) -> Steps[tuple[str, bool]]:
    """A name, and whether the bracket that ends it was behind it."""
    taken: list[str] = []
    mark = yield from tape.until((">", "\n", "<"), taken.append)
    if mark != ">":
        tape.put_back(mark or "")
    return "".join(taken), mark == ">"


def _parameters(tape: Tape, call: _CallWriter) -> Steps[None]:
    """What stands in a function's mark, to the end of the call. What is no parameter ends it."""
    while True:
        space = yield from tape.skip(_SPACES)
        if (yield from tape.expect(_PARAMETER, or_cut=True)):
            name, is_ended = yield from _name(tape)
            if is_ended:
                call.begin(name)
                if (yield from _value(tape, call, name)):
                    continue
                return
            if tape.cut_off and (yield from tape.ended()):
                return
            tape.put_back(_PARAMETER + name)
        elif (yield from tape.expect(_FUNCTION_END, or_cut=True)):
            break
        call.repaired = True
        tape.put_back(space)
        break
    call.close()
    space = yield from tape.skip(_SPACES)
    if not (yield from tape.expect(CLOSE, or_cut=True)):
        tape.put_back(space)


def _value(tape: Tape, call: _CallWriter, name: str) -> Steps[bool]:
    """A parameter's value; False where the reply was cut off in it."""
    schema = member(call.schema, name)
    is_text = takes_text(schema)
    taken: list[str] = []
    give = call.escaped if is_text else taken.append
    yield from tape.expect("\n")
    call.write('"' if is_text else "")
    end = yield from tape.until((*_VALUE_ENDS, *_LIKELY_ENDS), give)
    if end in _LIKELY_ENDS and not tape.is_absent(_PARAMETER_END):
        rest: list[str] = []
        later = yield from tape.until(_VALUE_ENDS, rest.append)
        held = "".join((end, *rest))
        if later is not None or tape.cut_off:
            give(held)
            end = later
        else:
            tape.put_back(held)
    elif end in _LIKELY_ENDS:
        tape.put_back(end)
    if end is None and tape.cut_off:
        return False
    call.repaired |= end not in _VALUE_ENDS
    call.write('"' if is_text else _converted(call, "".join(taken), schema))
    return True


def _converted(call: _CallWriter, text: str, schema: Mapping[str, Any]) -> str:
    """A value that is no text as JSON; as a text where it is none."""
    text = text.strip()
    if is_object(f'{{"value": {text}}}'):
        return text
    call.repaired = True
    repaired = repair_object(f'{{"value": {text}}}', {"properties": {"value": schema}})
    if repaired is None or "value" not in repaired.members:
        return json.dumps(text, ensure_ascii=False)
    return repaired.members["value"][0]


# -- what must come ------------------------------------------------------------------------------


def calls(grammar: CallGrammar) -> Calls:
    """Calls between their marks; parameters of a schema come in its order."""
    mark, close = grammar.mark(OPEN), grammar.mark(CLOSE)
    more = f"({grammar.mark(OPEN, chr(10))} body {close})*" if grammar.several else ""
    often = "*" if grammar.several else "?"
    bodies: list[str] = []
    for _, tool in grammar.callable_tools():
        is_known = grammar.is_strict(tool) and isinstance(tool.parameters.get("properties"), dict)
        parts = _parameters_of(tool) if is_known else ["any_parameter*"]
        begin = literal(f"\n{_FUNCTION}{tool.name}>\n")
        bodies.append(" ".join([begin, *parts, literal(f"{_FUNCTION_END}\n")]))
    return Calls(
        must=f"must_call: {mark} body {close} {more}",
        may=f"may_call: (opened body {close}){often} REST",
        rules=(
            f"body: {' | '.join(bodies)}",
            f'any_parameter: {literal(_PARAMETER)} /[^<>\\n]{{1,64}}/ ">\\n" text',
            "text[lazy]: /(?s:.*)\\n<\\/parameter>\\n/",
            grammar.until("opened", OPEN),
            grammar.without("REST", OPEN),
        ),
    )


def _parameters_of(tool: Tool) -> list[str]:
    """What matches each of a tool's parameters."""
    given = tool.parameters
    shared = {key: given[key] for key in ("$defs", "definitions") if key in given}
    required = given.get("required") or ()
    parts: list[str] = []
    for name, schema in given["properties"].items():
        begin = literal(f"{_PARAMETER}{name}>\n")
        part = f"{begin} {_value_of(f'{tool.name}.{name}', schema, shared)}"
        parts.append(part if name in required else f"({part})?")
    return parts


def _value_of(where: str, schema: Any, shared: Mapping[str, Any]) -> str:
    """What matches a parameter's value and its end. Raises RequestError for a kind of text that
    cannot be told without its quotes.
    """
    end = f"\n{_PARAMETER_END}\n"
    if not isinstance(schema, Mapping) or not takes_text(schema):
        rule = json_rule({**shared, **schema} if isinstance(schema, Mapping) else {})
        return f"({rule}) {literal(end)}"
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(allowed, list):
        return f"({' | '.join(literal(f'{_plain(each)}{end}') for each in allowed)})"
    beyond = sorted(_TEXT_RULES & set(schema))
    if beyond:
        message = f"{where}: {', '.join(beyond)} cannot be held in this dialect; leave it out."
        raise RequestError("tools", message)
    return "text"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


DIALECT = Dialect(
    name="qwen_xml",
    write=write,
    read=read,
    calls=calls,
    single_stops=(CLOSE,),
    is_shown_by=is_shown_by,
)
