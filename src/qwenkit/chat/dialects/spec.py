"""What a dialect of tool calling offers, and how it is found.

Each module of this folder ends in a constant `DIALECT`. A dialect writes tools, calls and results
into a conversation as plain messages, so that whatever a text of theirs looks like, it stays text;
and it reads calls out of a reply.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import qwenkit.chat.dialects
from qwenkit.chat.grammar import CallGrammar, Calls
from qwenkit.chat.parse import Grammar
from qwenkit.errors import RequestError, suggest
from qwenkit.types.messages import Message, Tool
from qwenkit.types.tools import ToolOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a dialect is given: `tools` are those that the model is to see. With `continues` the
    reply goes on with the last message. `template` is the checkpoint's own, if it has one.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    options: ToolOptions = field(default_factory=ToolOptions)
    continues: bool = False
    template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A conversation with tools, calls and results written into its messages.

    `tools` are left for the checkpoint's template to show. With a `reply_start` the reply goes on
    with the last message, whose end that is: what a grammar must know of it.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    reply_start: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One dialect.

    `write` raises RequestError naming the message that it has no place for. `read` is the grammar
    of a reply (`chat/parse.py`). `stops` end a reply that is to be followed by a tool's result;
    `single_stops` too, where it may have only one call. `calls` makes the rules of a grammar
    (`chat/grammar.py`); None where nothing is known of calls. `is_shown_by` says whether a
    checkpoint's template shows tools and calls in this dialect by itself.
    """

    name: str
    write: Callable[[Conversation], Written]
    read: Grammar
    calls: Callable[[CallGrammar], Calls] | None = None
    stops: tuple[str, ...] = ()
    single_stops: tuple[str, ...] = ()
    is_shown_by: Callable[[str], bool] | None = None


@cache
def dialects() -> dict[str, Dialect]:
    """Every dialect of this folder by its name."""
    found: dict[str, Dialect] = {}
    for info in pkgutil.iter_modules(qwenkit.chat.dialects.__path__):
        module = importlib.import_module(f"qwenkit.chat.dialects.{info.name}")
        dialect = getattr(module, "DIALECT", None)
        if dialect is not None:
            found[dialect.name] = cast(Dialect, dialect)
    return found


def find(name: str) -> Dialect:
    """The dialect of a name. Raises RequestError naming the known ones."""
    known = dialects()
    if name not in known:
        raise RequestError("tool_options.dialect", f"got {name!r}. {suggest(name, known)}")
    return known[name]


def shown_by(template: str) -> str | None:
    """The name of the dialect in which a checkpoint's template shows tools; None for another one,
    or where it shows none.
    """
    shown = [d.name for d in dialects().values() if d.is_shown_by and d.is_shown_by(template)]
    return shown[0] if shown else None


def visible(tools: Sequence[Tool], options: ToolOptions) -> tuple[Tool, ...]:
    """The tools that the model is to see. Raises RequestError for a choice that is none of them."""
    names = [tool.name for tool in tools]
    if options.named is not None and options.named not in names:
        known = suggest(options.named, names) if names else "There are no tools."
        raise RequestError("tool_options.choice", f"got {options.named!r}. {known}")
    if options.choice == "required" and not names:
        raise RequestError("tool_options.choice", "got 'required', but there are no tools.")
    return () if options.choice == "none" else tuple(tools)
