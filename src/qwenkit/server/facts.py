"""What is known of one HTTP request while it is served: for its log line and the counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenkit.types.events import Usage

KEY = "qwenkit.facts"


@dataclass(slots=True)
class Facts:
    """`client` is whose request it is, `key` the short name of the key alone. Times are of
    `time.perf_counter`, `first_token_s` of the first token of all answers.
    """

    request_id: str
    method: str
    path: str
    key: str = ""
    client: str = ""
    value: Any = None  # of the JSON body
    status: int = 0
    start_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    end_s: float | None = None
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: tuple[str, ...] = ()
    error: str | None = None
    prompt: Any = None
    replies: list[str] = field(default_factory=list)

    def saw_token(self) -> None:
        """The first token of all answers has come."""
        self.first_token_s = time.perf_counter()

    def count(self, usage: Usage, *, new_prompt: bool) -> None:
        """Add what one answer took; several answers to one prompt count it once."""
        self.completion_tokens += usage.completion_tokens
        if new_prompt:
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens

    def line(self) -> dict[str, Any]:
        """The log's line of it."""
        end_s = self.end_s or time.perf_counter()
        first_s = self.first_token_s
        values = {
            "request_id": self.request_id,
            "client": self.client or None,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "duration_s": round(end_s - self.start_s, 4),
            "first_token_s": None if first_s is None else round(first_s - self.start_s, 4),
            "model": self.model,
            "stream": self.stream or None,
            "prompt_tokens": self.prompt_tokens or None,
            "cached_tokens": self.cached_tokens or None,
            "completion_tokens": self.completion_tokens or None,
            "finish": ",".join(self.finish) or None,
            "error": self.error,
            "prompt": self.prompt,
            "replies": self.replies or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def facts_of(scope: Mapping[str, Any]) -> Facts:
    """The facts that the guard has put into an ASGI scope."""
    facts: Facts = scope[KEY]
    return facts
