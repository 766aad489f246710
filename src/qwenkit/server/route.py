"""How endpoints are registered: their bodies are what the guard has read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from qwenkit.server.facts import facts_of


class _JsonRequest(Request):
    async def json(self) -> Any:
        return facts_of(self.scope).value


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handler


def group() -> APIRouter:
    """A group of endpoints, for one file."""
    return APIRouter(route_class=_JsonRoute)
