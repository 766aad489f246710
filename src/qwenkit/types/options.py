"""What a request asks of the engine beside its tokens: whose it is, how urgent, what adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwenkit.errors import RequestError, suggest
from qwenkit.types.sampling import number_between, whole_number

_MOST_PRIORITY = 1_000_000
_LONGEST_TIMEOUT_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """Place in the line, deadline, cache and adapter of one request.

    Clients share the engine evenly, whatever they ask for: `client` names whose request it is.
    A request of higher `priority` goes before all of lower. After `timeout_s` seconds the request
    ends with the reason "timeout" and what it has. Prefixes are shared between requests of the same
    `cache_salt` only, so that no tenant can tell by the time what another one asked. `adapter` is
    the name of a loaded LoRA adapter (None: the model as it is).

    Raises RequestError naming the field on construction.
    """

    client: str = ""
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    adapter: str | None = None

    def __post_init__(self) -> None:
        for field in ("client", "cache_salt"):
            if not isinstance(getattr(self, field), str):
                raise RequestError(field, f"expected a text, got {getattr(self, field)!r}.")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise RequestError("adapter", f"expected a name or none, got {self.adapter!r}.")
        priority = whole_number("priority", self.priority, -_MOST_PRIORITY, _MOST_PRIORITY)
        object.__setattr__(self, "priority", priority)
        if self.timeout_s is not None:
            timeout_s = number_between("timeout_s", self.timeout_s, 0.0, _LONGEST_TIMEOUT_S)
            object.__setattr__(self, "timeout_s", timeout_s)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error naming the nearest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise RequestError(str(name), f"unknown request option. {suggest(name, names)}")
        return cls(**options)
