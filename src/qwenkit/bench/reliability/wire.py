"""A request as data: what is sent to a server, and kept in a file where it broke something."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwenkit.bench.http_client import Answer, Header, Target, ask

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Content = object | Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One request. `content` is sent as JSON, bytes as they are; a function makes it when it is
    needed, for those that are large.
    """

    path: str = CHAT
    content: Content = None
    method: str = "POST"
    headers: tuple[Header, ...] = ()

    def body(self) -> bytes | None:
        """The bytes that are sent."""
        content = self.content() if callable(self.content) else self.content
        if content is None or isinstance(content, bytes):
            return content
        return json.dumps(content).encode()

    async def send(self, target: Target, timeout_s: float = 60.0) -> Answer:
        """What the server makes of it; see `http_client.ask`."""
        return await ask(
            target,
            self.path,
            self.body(),
            method=self.method,
            headers=self.headers,
            timeout_s=timeout_s,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: the body as text where it is one, else in base64."""
        body = self.body()
        data: dict[str, Any] = {"method": self.method, "path": self.path}
        data["headers"] = [list(pair) for pair in self.headers]
        if body is None:
            return data
        try:
            return data | {"body": body.decode()}
        except UnicodeDecodeError:
            return data | {"body_base64": base64.b64encode(body).decode()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        body: bytes | None = None
        if "body_base64" in data:
            body = base64.b64decode(data["body_base64"])
        elif "body" in data:
            body = data["body"].encode()
        pairs = tuple((str(name), str(value)) for name, value in data.get("headers", ()))
        return cls(path=data["path"], content=body, method=data["method"], headers=pairs)


def fault_of_answer(answer: Answer, *, names: tuple[str, ...] = ()) -> str:
    """What an answer does not keep of the promise: a valid 2xx, or a 4xx with OpenAI's error object
    that names one of `names`, if there are any. Empty where it keeps it.
    """
    if 200 <= answer.status < 300:
        value = answer.json()
        is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
        return "" if is_stream or isinstance(value, dict | list) else f"no JSON: {answer.shown}"
    if not 400 <= answer.status < 500:
        return answer.shown
    value = answer.json()
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return f"no error object: {answer.shown}"
    missing = {"type", "param", "code"} - set(error)
    if missing:
        return f"an error object without {sorted(missing)}: {answer.shown}"
    said = f"{error['param']} {error['message']}".lower()
    if names and not any(name.lower() in said for name in names):
        return f"does not name {' or '.join(names)}: {answer.shown}"
    return ""
