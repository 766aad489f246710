"""Hermes: a JSON object between <tool_call> and </tool_call>, as Qwen2.5 and later models do it.

Their templates show tools, calls and results by themselves. For another ChatML model, such as the
default one, the same is written into its messages here.

Source: the chat template of Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qwenkit.chat.dialects.spec import Conversation, Dialect, Written
from qwenkit.chat.grammar import CallGrammar, Calls
from qwenkit.chat.json_repair import Repaired, repair_arguments, repair_object
from qwenkit.chat.json_scan import JsonScan
from qwenkit.chat.parse import read_arguments
from qwenkit.chat.rewrite import rewritten
from qwenkit.chat.tape import Steps, Tape
from qwenkit.types.messages import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ENDS = (CLOSE, OPEN)
_INSTRUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
_HEADER = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{'
)
_BEFORE = re.compile(r"[\s\[]*")
_BETWEEN = re.compile(r"[\s},\]]*")
_SPACES = re.compile(r"\s*")
_FENCE = re.compile(r"```(?:json)?|```\Z")
_NAMES = ("name", "function", "tool")
_ARGUMENTS = ("arguments", "parameters", "args")


def is_shown_by(template: str) -> bool:
    """True where a checkpoint's template shows tools and calls in this dialect by itself."""
    return (
        re.search(r"\btools\b", template) is not None
        and OPEN in template
        and "<function=" not in template  # calls in XML, as Qwen3-Coder has them
    )


# -- writing -------------------------------------------------------------------------------------


def write(conversation: Conversation) -> Written:
    """By the template, or else as Qwen2.5's does it."""
    if conversation.template is not None and is_shown_by(conversation.template):
        return Written(messages=conversation.messages, tools=conversation.tools)
    messages = rewritten(conversation.messages, conversation.tools, _INSTRUCTION, _call)
    return Written(messages=messages)


def _call(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {name}, "arguments": {call.arguments}}}\n{CLOSE}'


# -- reading -------------------------------------------------------------------------------------


def read(tape: Tape) -> Steps[None]:
    """Text, and calls between their marks."""
    opened = tape.start.rfind(OPEN)
    if opened >= 0 and CLOSE not in tape.start[opened:]:
        tape.put_back(tape.start[opened:])  # a call that the reply goes on with
    while True:
        mark = yield from tape.until((OPEN,) if tape.may_call else (), tape.say)
        if mark is None:
            return
        yield from _between_marks(tape)


def _between_marks(tape: Tape) -> Steps[None]:
    """One call, or several, behind the opening mark."""
    before = OPEN
    while True:
        before += yield from tape.skip(_BEFORE)
        unread = yield from _one_call(tape, before)
        if unread is not None:
            tape.say(unread)
            return
        yield from tape.skip(_BETWEEN)
        if (yield from tape.expect("```")):
            yield from tape.skip(_SPACES)
        if (yield from tape.expect(CLOSE, or_cut=True)):
            return
        if not tape.may_call or not (yield from tape.expect("{")):
            return
        tape.put_back("{")
        before = ""


def _one_call(tape: Tape, before: str) -> Steps[str | None]:
    """A call; or the text that was taken, where there is none. `before` was taken already."""
    scan = JsonScan()
    raw: list[str] = []
    levels: int | None = 2
    while not (scan.complete or scan.broken):
        chunk = yield from tape.chunk()
        if chunk is None:
            break
        used = scan.feed(chunk, levels=levels)
        raw.append(chunk[:used])
        tape.put_back(chunk[used:])
        if levels is not None and scan.levels == levels:
            levels = None
            header = _HEADER.fullmatch("".join(raw))
            if header is not None:
                tape.put_back("{")
                name = tape.known_name(json.loads(header[1]))
                yield from read_arguments(tape, name, _ENDS)
                return None
    source = "".join(raw)
    cut_off = False
    if not scan.complete:
        tape.put_back(source)
        taken: list[str] = []
        end = yield from tape.until(_ENDS, taken.append)
        tape.put_back(end or "")
        source, cut_off = "".join(taken), end is None and tape.cut_off
    calls = None if cut_off else _lenient_calls(tape, source)
    if calls is None:
        return before + source
    for name, arguments, repaired in calls:
        tape.whole_call(name, arguments, repaired=repaired)
    return None


def _lenient_calls(tape: Tape, source: str) -> list[tuple[str, str, bool]] | None:
    """The calls in a text that is not what was asked for: members in another order, a fence, broken
    JSON. None where something in it is no call.
    """
    text = _FENCE.sub("", source).strip()
    calls: list[tuple[str, str, bool]] = []
    at = 0
    while at < len(text):
        found = repair_object(text, start=at) if text[at] == "{" else None
        call = None if found is None else _call_of(tape, found)
        if found is None or call is None:
            return None
        calls.append(call)
        between = _BETWEEN.match(text, at + found.used)
        at = len(text) if between is None else between.end()
    return calls or None


def _call_of(tape: Tape, found: Repaired) -> tuple[str, str, bool] | None:
    """Name, arguments, and whether these are not what was written."""
    members: Mapping[str, tuple[str, str]] = found.members
    named: Any = next((json.loads(members[key][0]) for key in _NAMES if key in members), None)
    if not isinstance(named, str) or not named.strip():
        return None
    name = tape.known_name(named.strip())
    written, source = next((members[key] for key in _ARGUMENTS if key in members), ("", ""))
    if written.startswith("{"):
        return name, written, written != source
    arguments = repair_arguments(written, tape.schema(name))
    return None if arguments is None else (name, arguments, True)


def calls(grammar: CallGrammar) -> Calls:
    """Calls between their marks, a line break between two."""
    mark, close = grammar.mark(OPEN), grammar.mark(CLOSE)
    more = f"({grammar.mark(OPEN, chr(10))} body {close})*" if grammar.several else ""
    often = "*" if grammar.several else "?"
    return Calls(
        must=f"must_call: {mark} body {close} {more}",
        may=f"may_call: (opened body {close}){often} REST",
        rules=(
            *grammar.bodies('\n{"name": {quoted}, "arguments": ', "}\n"),
            grammar.until("opened", OPEN),
            grammar.without("REST", OPEN),
        ),
    )


DIALECT = Dialect(
    name="hermes",
    write=write,
    read=read,
    calls=calls,
    single_stops=(CLOSE,),
    is_shown_by=is_shown_by,
)
