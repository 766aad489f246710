"""/health and /ready: the only answers that need no key."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Request
from starlette.responses import Response

from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import json_answer
from qwenkit.server.wire.base import Shape

Responses = dict[int | str, dict[str, Any]]
router = group()


class Health(Shape):
    """Whether the engine lives; "stuck" is one whose step does not end."""

    status: Literal["ok", "dead", "stuck"]


class Ready(Shape):
    """Whether new requests are taken."""

    status: Literal["ready", "dead", "stuck", "draining"]


_UNWELL: Responses = {
    503: {
        "model": Health,
        "description": "The engine has ended or is stuck: start the server again.",
    }
}
_NOT_READY: Responses = {503: {"model": Ready, "description": "No new requests are taken."}}


@router.get("/health", response_model=Health, responses=_UNWELL, summary="Whether it lives.")
async def health(request: Request) -> Response:
    """Needs no key, and says nothing else."""
    served: Served = request.app.state.served
    state = served.state
    return json_answer({"status": state}, 200 if state == "ok" else 503)


@router.get(
    "/ready", response_model=Ready, responses=_NOT_READY, summary="Whether it takes new requests."
)
async def ready(request: Request) -> Response:
    """Needs no key, and says nothing else."""
    served: Served = request.app.state.served
    state = served.state
    if state != "ok":
        return json_answer({"status": state}, 503)
    if served.draining:
        return json_answer({"status": "draining"}, 503)
    return json_answer({"status": "ready"})
