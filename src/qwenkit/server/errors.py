"""What goes wrong with a request, as OpenAI's clients expect to be told it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qwenkit.errors import (
    MissingDependencyError,
    QwenkitError,
    RequestError,
    TemplateError,
    TokenizerError,
    UsageError,
)

_OLD_WORDS = ("Expecting ", "Incorrect role ")
INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Fields of the library, and what they are called in a request.
_FIELDS = {
    "constraint.json_schema": "response_format",
    "constraint.regex": "guided_regex",
    "constraint.choice": "guided_choice",
    "constraint.grammar": "guided_grammar",
    "template_kwargs": "chat_template_kwargs",
    "prompts": "prompt",
    "client": "user",
    "tool_options": "tool_choice",
}
# What one route calls as others do not.
_OF_ROUTES = {"/v1/responses": "text.format", "/api/": "format"}


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal: its HTTP status, and the fields of OpenAI's error object.

    `old_detail` is what the first generation's server called `detail`.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    old_detail: str | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """OpenAI's name of the family of errors."""
        if self.status in _KINDS:
            return _KINDS[self.status]
        return INVALID if self.status < 500 else "server_error"

    def content(self) -> dict[str, object]:
        """The error object."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error} | ({} if self.old_detail is None else {"detail": self.old_detail})

    def body(self, path: str = "") -> bytes:
        """The error object as JSON, with the fields' names of that route; below /api/ it is
        Ollama's, a text.
        """
        said = self
        for route, name in _OF_ROUTES.items():
            if path.startswith(route) and (self.param or "").startswith("response_format"):
                param = (self.param or "").replace("response_format", name, 1)
                message = self.message.replace("response_format", name, 1)
                said = replace(self, message=message, param=param)
        content = {"error": said.message} if path.startswith("/api/") else said.content()
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def described(error: Exception, prompt_field: str = "messages") -> ApiError:
    """An error of the library as a refusal; its prompt came as the field `prompt_field`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return _of_request(error, prompt_field)
    if isinstance(error, TemplateError | TokenizerError):
        return ApiError(400, str(error), prompt_field, "invalid_value")
    if isinstance(error, MissingDependencyError):
        return ApiError(400, str(error), None, "unsupported_value")
    if isinstance(error, UsageError):
        closed = "engine is closed" in str(error)
        return ApiError(503 if closed else 400, str(error), code="unavailable" if closed else None)
    if isinstance(error, QwenkitError):
        return ApiError(500, str(error), code="server_error")
    return ApiError(500, "The server made a mistake; its log says which.", code="server_error")


def _of_request(error: RequestError, prompt_field: str) -> ApiError:
    reason = str(error).removeprefix(f"{error.field}: ")
    if error.field in ("prompt_ids", "prompt"):
        too_long = reason.startswith("the prompt has ")
        code = "context_length_exceeded" if too_long else "invalid_value"
        return ApiError(400, f"{prompt_field}: {reason}", prompt_field, code)
    if error.field.startswith("messages") and reason.startswith(_OLD_WORDS):
        return in_old_words(reason, error.field)
    name = error.field
    for ours, theirs in _FIELDS.items():
        if name == ours or name.startswith((f"{ours}.", f"{ours}[")):
            name = theirs + name[len(ours) :]
    return ApiError(400, f"{name}: {reason}", name, "invalid_value")


def in_old_words(reason: str, param: str) -> ApiError:
    """A refusal of a conversation, as the first generation's server wrote it."""
    text = f"Invalid request: {reason}"
    return ApiError(400, text, param, "invalid_value", old_detail=text)
