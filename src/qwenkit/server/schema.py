"""/openapi.json: the published schema, which says what is really taken and answered."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from qwenkit.server.route import group
from qwenkit.server.settings import Access
from qwenkit.server.sse import json_answer
from qwenkit.server.wire.base import Shape

router = group()
_ERRORS = {
    "400": "Something in the request cannot be done; `param` names the field.",
    "401": "A key is needed.",
    "403": "The page that asks may not.",
    "404": "Nothing is served under that name.",
    "405": "The path does not take this method.",
    "408": "The request did not come in time.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "421": "The server is not known under that name.",
    "429": "Too many answers wait; ask again after Retry-After seconds.",
    "431": "The header is too large.",
    "500": "The answer failed.",
    "503": "The server is shutting down.",
}
_STREAMS = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
}
OPEN = ("/health", "/ready")


class ErrorShape(Shape):
    """What went wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object. `detail` is what the first generation's server said instead."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorShape
    detail: str | None = None


class OllamaError(BaseModel):
    """Ollama's."""

    model_config = ConfigDict(extra="forbid")

    error: str


@router.get(
    "/openapi.json",
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
    summary="This schema.",
)
async def openapi(request: Request) -> Response:
    """OpenAPI 3.1."""
    return json_answer(await published(request))


async def published(request: Request) -> dict[str, Any]:
    """The schema, made once; that takes a while, in which the event loop is free."""
    state = request.app.state
    if state.schema is None:
        state.schema = await asyncio.to_thread(request.app.openapi)
    schema: dict[str, Any] = state.schema
    return schema


def complete(app: FastAPI, access: Access) -> dict[str, Any]:
    """The schema that FastAPI makes, with the errors, streams and keys that it does not know of."""
    schema: dict[str, Any] = FastAPI.openapi(app)
    parts = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    for shape in (ErrorShape, ErrorAnswer, OllamaError):
        template = "#/components/schemas/{model}"
        made = shape.model_json_schema(ref_template=template)
        made.pop("$defs", None)
        parts[shape.__name__] = made
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _describe(path, operation)
    ways: dict[str, Any] = {}
    if access.api_keys:
        ways["key"] = {"type": "http", "scheme": "bearer"}
    if access.users:
        ways["password"] = {"type": "http", "scheme": "basic"}
    if ways:
        schema["components"]["securitySchemes"] = ways
        schema["security"] = [{name: []} for name in ways]
    return schema


def _describe(path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    if path in OPEN:
        operation["security"] = []
        return
    shape = "OllamaError" if path.startswith("/api/") else "ErrorAnswer"
    for status, words in _ERRORS.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
        answers.setdefault(status, {"description": words, "content": content})
    if path in _STREAMS:
        kind = _STREAMS[path]
        answers["200"]["content"][kind] = {}  # OpenAPI 3.1 has no words for a stream's parts
