"""How a reply may call tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from qwenkit.errors import RequestError, suggest

Language = Literal["auto", "en", "zh"]
_NO_NAMES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """How a reply may call the tools that are given with its conversation.

    `choice` "auto" lets the model decide, "none" hides the tools from it, "required" makes it call
    at least one, the name of a tool exactly that one. Without `parallel` a reply has at most one
    call. `constrained` allows only arguments of the tools' schemas; it needs llguidance, and so do
    "required" and a name. `language` is that of the instruction, where the dialect has several
    ("auto": Chinese if the conversation has Chinese characters). `dialect` is the name of the
    format in which calls are written (None: the model's own).

    Raises RequestError naming the field on construction.
    """

    choice: str = "auto"
    parallel: bool = True
    constrained: bool = False
    language: Language = "auto"
    dialect: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.choice, str) or not self.choice:
            allowed = f"{', '.join(_NO_NAMES)}, or a tool's name"
            raise RequestError("tool_options.choice", f"got {self.choice!r}; allowed: {allowed}.")
        for field in ("parallel", "constrained"):
            if not isinstance(getattr(self, field), bool):
                given = getattr(self, field)
                raise RequestError(f"tool_options.{field}", f"expected a bool, got {given!r}.")
        if self.language not in get_args(Language):
            known = suggest(str(self.language), get_args(Language))
            raise RequestError("tool_options.language", f"got {self.language!r}. {known}")
        if self.dialect is not None and not isinstance(self.dialect, str):
            raise RequestError("tool_options.dialect", f"expected a name, got {self.dialect!r}.")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error naming the nearest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                known = suggest(str(name), names)
                raise RequestError("tool_options", f"{name!r} is unknown. {known}")
        return cls(**options)

    @property
    def named(self) -> str | None:
        """The one tool that must be called, if one is named."""
        return None if self.choice in _NO_NAMES else self.choice

    @property
    def must_call(self) -> bool:
        """True where a reply without a call is not allowed."""
        return self.choice not in ("auto", "none")
