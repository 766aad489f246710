"""/v1/models: the model under its names, and its adapters."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Request
from starlette.responses import Response

from qwenkit.server.route import group
from qwenkit.server.served import Served, Target
from qwenkit.server.sse import json_answer
from qwenkit.server.wire.base import Shape

router = group()


class Model(Shape):
    """Something that can be named as `model`. `parent` is the model that an adapter belongs to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["qwenkit"]
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Shape):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


@router.get("/v1/models", response_model=ModelList, summary="What is served, and its adapters.")
async def list_models(request: Request) -> Response:
    """The first one is what a request means that names none."""
    served: Served = request.app.state.served
    data = [_card(served, target) for target in served.names()]
    return json_answer({"object": "list", "data": data})


@router.get("/v1/models/{model:path}", response_model=Model, summary="One of them.")
async def retrieve_model(model: str, request: Request) -> Response:
    """404 with the list of names where nothing is served under this one."""
    served: Served = request.app.state.served
    return json_answer(_card(served, served.target(model)))


def _card(served: Served, target: Target) -> dict[str, Any]:
    first = served.settings.names[0]
    return {
        "id": target.name,
        "object": "model",
        "created": served.created,
        "owned_by": "qwenkit",
        "root": first,
        "parent": first if target.adapter == target.name else None,
        "max_model_len": served.llm.context_tokens,
    }
