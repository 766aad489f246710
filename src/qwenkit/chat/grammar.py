"""What a reply must be, as a Lark grammar in llguidance's dialect: calls, thoughts, an answer.

A mark such as <tool_call> is one token in some vocabularies and plain text in others. Text around
marks ends where the next mark does: as the token, which text never holds, or as the first place
where the text has it (a lazy rule).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenkit.errors import RequestError
from qwenkit.types.constraint import SPACES, Constraint
from qwenkit.types.messages import Tool
from qwenkit.types.tools import ToolOptions

_ANY_TEXT = "/(?s:.*)/"
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGrammar:
    """What a dialect makes rules of: the tools that may be called, the options, what of the reply
    stands in the prompt already, and which marks are tokens of their own.
    """

    tools: tuple[Tool, ...]
    options: ToolOptions
    start: str = ""
    control_tokens: frozenset[str] = field(default_factory=frozenset)

    @property
    def several(self) -> bool:
        """True where a reply may have more than one call."""
        return self.options.parallel and self.options.named is None

    def mark(self, text: str, before: str = "") -> str:
        """A mark as a token or as text, text before it."""
        if text not in self.control_tokens:
            return literal(before + text)  # one lexeme: a lexer never goes back
        return f"{literal(before)} {text}" if before else text

    def until(self, name: str, mark: str) -> str:
        """A rule of that name: any text, and the mark that ends it."""
        if mark in self.control_tokens:
            return f"{name}: {_ANY_TEXT} {mark}"
        return f"{name}[lazy]: /(?s:.*){_regex(mark)}/"

    def without(self, name: str, mark: str) -> str:
        """A terminal of that name: any text without the mark."""
        if mark in self.control_tokens:
            return f"{name}: {_ANY_TEXT}"
        return f"{name}: {_ANY_TEXT} & ~/(?s:.*){_regex(mark)}(?s:.*)/"

    def callable_tools(self) -> list[tuple[int, Tool]]:
        """The tools that may be called, each with its place."""
        named = self.options.named
        return [(i, t) for i, t in enumerate(self.tools) if named is None or t.name == named]

    def is_strict(self, tool: Tool) -> bool:
        """True where its arguments must be those of its schema."""
        return self.options.constrained or tool.strict

    def bodies(self, begin: str, end: str) -> list[str]:
        """The rules `body`, a call of any of the tools with arguments in JSON, and its parts.

        `begin` and `end` are the texts around the arguments, {name} and {quoted} in them the tool's
        name and the same as JSON.
        """
        rules: list[str] = []
        bodies: list[str] = []
        for i, tool in self.callable_tools():
            quoted = json.dumps(tool.name, ensure_ascii=False)
            first = begin.replace("{quoted}", quoted).replace("{name}", tool.name)
            schema = dict(tool.parameters) if self.is_strict(tool) else _ANY_OBJECT
            if "type" not in schema and "$ref" not in schema:
                schema = {"type": "object", **schema}
            rules.append(f"arguments_{i}: {json_rule(schema)}")
            last = f" {literal(end)}" if end else ""
            bodies.append(f"{literal(first)} arguments_{i}{last}")
        return [f"body: {' | '.join(bodies)}", *rules]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """A dialect's rules. `must` is the rule of a reply that is nothing but calls, `may` of one that
    has calls in its text.
    """

    must: str
    may: str
    rules: Sequence[str]


def may_think(start: str) -> bool:
    """True where thoughts may come: none have ended in the prompt, and no answer has begun."""
    at = start.rfind("<think>")
    return not start.strip() if at < 0 else "</think>" not in start[at:]


def literal(text: str) -> str:
    """A text as a grammar writes it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON value of a schema, with as much space between its signs as a constraint allows."""
    spaced = {"x-guidance": {"whitespace_pattern": SPACES}, **schema}
    return f"%json {json.dumps(spaced, ensure_ascii=False)}"


def reply_constraint(
    calls: Calls | None, grammar: CallGrammar, *, thinks: bool, asked: Constraint | None
) -> Constraint | None:
    """What the reply must be: calls where the options say so, else `asked` or, where there are
    tools, calls instead of it. A model that thinks may do so before.

    Raises RequestError where `asked` does not go together with that.
    """
    options, thinks = grammar.options, thinks and may_think(grammar.start)
    strict = any(map(grammar.is_strict, grammar.tools))
    rules = list(calls.rules) if calls is not None else []
    if calls is not None and options.must_call:
        if asked is not None:
            message = "is given beside a tool that must be called; drop one."
            raise RequestError(f"constraint.{asked.kind}", message)
        rules += [calls.must, "reply: must_call"]
    elif calls is not None and asked is not None:
        rules += [calls.must, *_answer(asked), "reply: must_call | answer"]
    elif calls is not None and strict:
        rules += [calls.may, "reply: may_call"]
    elif asked is not None and thinks:
        if asked.grammar is not None and "<think>" not in grammar.start:
            return asked
        rules += [*_answer(asked), "reply: answer"]
    else:
        return asked
    text = "\n".join([*_start(grammar, thinks=thinks), *rules])
    source = "tools" if calls is not None or asked is None else asked.field
    try:
        return Constraint(grammar=text, source=source)
    except RequestError as error:
        reason = str(error).removeprefix(f"{error.field}: ")
        raise RequestError("tools", f"the grammar of their calls {reason}") from error


def _start(grammar: CallGrammar, *, thinks: bool) -> list[str]:
    """The rule `start`: the reply, and before it the thoughts that have not ended in the prompt."""
    if not thinks:
        return ["start: reply"]
    thought = grammar.until("thought", "</think>")
    if "<think>" in grammar.start:
        return ["start: thought BREAKS reply", "BREAKS: /\\n{0,2}/", thought]
    begin = grammar.mark("<think>")
    return [f"start: ({begin} thought BREAKS)? reply", "BREAKS: /\\n{0,2}/", thought]


def _answer(asked: Constraint) -> list[str]:
    if asked.json_schema is not None:
        schema = json.loads(asked.json_schema)
        return [f"answer: {json_rule(schema)}"]
    if asked.choice is not None:
        return [f"answer: {' | '.join(map(literal, asked.choice))}"]
    if asked.regex is not None:
        return [f"answer: ANSWER\nANSWER: /{_slashes_escaped(asked.regex)}/"]
    raise RequestError(
        "constraint.grammar", "does not go together with tools or thoughts; use another kind."
    )


def _regex(text: str) -> str:
    """An expression that matches `text`, in a grammar."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


def _slashes_escaped(regex: str) -> str:
    """A regular expression between slashes: those of its own behind a backslash."""
    pieces: list[str] = []
    escaped = False
    for character in regex:
        pieces.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(pieces)
