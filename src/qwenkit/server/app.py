"""The web application: every group of endpoints, behind the guard."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qwenkit import __version__
from qwenkit.api import AsyncLLM
from qwenkit.server import (
    chat,
    completions,
    docs_page,
    embeddings,
    health,
    metrics,
    models,
    ollama,
    ollama_models,
    responses,
    schema,
    tokens,
)
from qwenkit.server.conversation import incorrect_role
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import facts_of
from qwenkit.server.guard import Guard
from qwenkit.server.metrics import Metrics
from qwenkit.server.served import Served
from qwenkit.server.settings import ServerSettings
from qwenkit.server.wire.base import refusal

_GROUPS = (
    chat.router,
    completions.router,
    responses.router,
    embeddings.router,
    models.router,
    tokens.router,
    ollama.router,
    ollama_models.router,
    health.router,
    metrics.router,
    schema.router,
    docs_page.router,
)


def make_app(llm: AsyncLLM, settings: ServerSettings) -> Guard:
    """The application that serves `llm`, which stays the caller's to close."""
    return guarded(Served(llm, settings))


def guarded(served: Served) -> Guard:
    """The same for what is served."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with served.looked_after():
            yield

    app = FastAPI(
        title="qwenkit",
        version=__version__,
        summary="One model behind the OpenAI API, and Ollama's.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        strict_content_type=False,
    )
    app.state.served = served
    app.state.metrics = Metrics(served)
    app.state.schema = None
    app.openapi = partial(schema.complete, app, served.settings.access)  # type: ignore[method-assign]
    for group in _GROUPS:
        app.include_router(group)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _refuse)
    posts = {
        route.path
        for group in _GROUPS
        for route in group.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    return Guard(
        app,
        served.settings,
        takes_body=posts.__contains__,
        draining=lambda: served.draining,
        observe=app.state.metrics.observe,
    )


async def _refuse(request: Request, error: Exception) -> Response:
    refused, path = described(error), request.scope["path"]
    facts_of(request.scope).error = refused.code or refused.kind
    body, headers = refused.body(path), dict(refused.headers)
    return Response(body, refused.status, headers, media_type="application/json")


async def _refuse_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    body = facts_of(request.scope).value
    refused = refusal(error.errors(), body)
    role = re.fullmatch(r"messages\[(\d+)\]\.role", refused.param or "")
    if role is not None and refused.code == "invalid_value":
        refused = incorrect_role(body["messages"][int(role[1])]["role"], role[0])
    return await _refuse(request, refused)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or no such method there."""
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"], request.scope["method"]
    if error.status_code == 404:
        message = f"There is nothing at {path:.200}; /docs lists what there is."
        return await _refuse(request, ApiError(404, message, code="unknown_url"))
    if error.status_code == 405:
        message = f"{path:.200} does not take {method:.20}."
        headers = dict(error.headers or {})
        refused = ApiError(405, message, code="method_not_allowed", headers=headers)
        return await _refuse(request, refused)
    return await _refuse(request, ApiError(error.status_code, str(error.detail)))
