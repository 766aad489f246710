"""What a prompt's reply needs: how it is read, where it stops, what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwenkit.chat.dialects.spec import Dialect
from qwenkit.chat.grammar import CallGrammar, reply_constraint
from qwenkit.chat.parse import (
    THINK_END,
    ReplyCollector,
    ReplyParser,
    thoughts,
)
from qwenkit.chat.pieces import TURN_START, Piece
from qwenkit.chat.tape import Steps, Tape
from qwenkit.errors import RequestError
from qwenkit.types.completion import Reply
from qwenkit.types.constraint import Constraint
from qwenkit.types.messages import Tool
from qwenkit.types.tools import ToolOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """How the reply to one prompt is written. `tools` are those that the model sees, `start` what
    of the reply stands in the prompt already, `control_tokens` the texts that are tokens of their
    own.
    """

    dialect: Dialect
    tools: tuple[Tool, ...] = ()
    options: ToolOptions = field(default_factory=ToolOptions)
    start: str = ""
    thinks: bool = False
    control_tokens: frozenset[str] = field(default_factory=frozenset)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the reply, beside the model's own stops."""
        if not self.tools:
            return ()
        single = () if self.options.parallel else self.dialect.single_stops
        return (*self.dialect.stops, *single)

    def constraint(self, asked: Constraint | None) -> Constraint | None:
        """What the whole reply must be: `asked`, or what the options say of calls; see
        `grammar.reply_constraint`.
        """
        grammar = CallGrammar(
            tools=self.tools,
            options=self.options,
            start=self.start,
            control_tokens=self.control_tokens,
        )
        has_calls = self.tools and self.dialect.calls is not None
        calls = self.dialect.calls(grammar) if has_calls and self.dialect.calls else None
        if calls is None and self.options.must_call:
            message = f"the dialect {self.dialect.name!r} cannot make the model call."
            raise RequestError("tool_options.choice", message)
        return reply_constraint(calls, grammar, thinks=self.thinks, asked=asked)

    def parser(self) -> ReplyParser:
        """A parser at the beginning of the reply."""
        tape = Tape(self.tools, parallel=self.options.parallel, start=self.start)
        return ReplyParser(self._read, tape)

    def parsed(self, text: str, *, complete: bool = True) -> Reply:
        """A whole reply; see `ReplyParser.end` for `complete`."""
        parser, collector = self.parser(), ReplyCollector()
        collector.add(parser.push(text))
        collector.add(parser.end(complete=complete))
        return collector.reply()

    def _read(self, tape: Tape) -> Steps[None]:
        if self.thinks:
            yield from thoughts(tape)
        yield from self.dialect.read(tape)


def thinks(template: str | None) -> bool:
    """True where a checkpoint's template knows thoughts."""
    return template is not None and THINK_END in template


def open_turn(pieces: Sequence[Piece], stop_ids: Sequence[int]) -> str:
    """What stands in the prompt of the turn that the reply goes on with, its header left out.

    Without ChatML's turns the header is not known: only an open thought is found then.
    """
    last = len(pieces)
    while last and not (pieces[last - 1].control and _begins(pieces[last - 1], stop_ids)):
        last -= 1
    text = "".join(piece.text for piece in pieces[last:])
    if last and pieces[last - 1].text == TURN_START:
        return text.partition("\n")[2]
    return text[text.rindex("<think>") :] if "<think>" in text else ""


def _begins(piece: Piece, stop_ids: Sequence[int]) -> bool:
    return piece.text == TURN_START or piece.ids[0] in stop_ids
