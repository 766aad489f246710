"""Ollama's endpoints that tell what is served, and /api/embed."""

from __future__ import annotations

import hashlib
import math
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.server.embeddings import embedded
from qwenkit.server.errors import ApiError
from qwenkit.server.facts import facts_of
from qwenkit.server.route import group
from qwenkit.server.served import Served, Target
from qwenkit.server.sse import json_answer
from qwenkit.server.wire.embeddings import EmbeddingRequest
from qwenkit.server.wire.ollama import (
    VERSION,
    OllamaEmbed,
    OllamaShow,
    RunningTags,
    Shown,
    Tags,
    Vectors,
    Version,
)

router = group()
_LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"


def served_name(served: Served, given: str) -> str:
    """The name that a model of this name is served under; ":latest" may stand behind it. Raises
    ApiError 404.
    """
    names = [target.name for target in served.names()]
    name = given if given in names else given.removesuffix(_LATEST)
    return served.target(name).name


def now() -> str:
    """The time as Ollama writes it."""
    return _written(time.time())


@router.get("/api/tags", response_model=Tags, summary="Ollama's: what is served.")
async def tags(request: Request) -> Response:
    """The model and its adapters."""
    served: Served = request.app.state.served
    return json_answer({"models": [_tag(served, target) for target in served.names()]})


@router.get("/api/ps", response_model=RunningTags, summary="Ollama's: what is loaded.")
async def running(request: Request) -> Response:
    """All that is served is loaded."""
    served: Served = request.app.state.served
    more = {"expires_at": _NEVER, "size_vram": 0}
    return json_answer({"models": [_tag(served, target) | more for target in served.names()]})


@router.get("/api/version", response_model=Version, summary="Ollama's: its version.")
async def version(request: Request) -> Response:
    """The version of the API that these endpoints follow, not of this program."""
    return json_answer({"version": VERSION})


@router.post("/api/show", response_model=Shown, summary="Ollama's: what a model is.")
async def show(body: OllamaShow, request: Request) -> Response:
    """Its template, sampling, shape and what it can do."""
    served: Served = request.app.state.served
    given = body.model or body.name
    if given is None:
        raise ApiError(400, "model: this field is needed.", "model", "missing_required_parameter")
    served_name(served, given)
    record, config = served.llm.record, served.llm.config
    sampling = record.sampling
    family = record.model_type
    shown = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    capabilities = ["completion", "embedding"]
    if record.chat_format != "raw":
        capabilities.append("tools")
    if "enable_thinking" in (record.chat_template or ""):
        capabilities.append("thinking")
    return json_answer(
        {
            "modelfile": f"FROM {given}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in shown.items()),
            "template": record.chat_template or "",
            "details": _details(served),
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": _parameters(served),
                f"{family}.context_length": served.llm.context_tokens,
                f"{family}.embedding_length": config.hidden_size,
                f"{family}.block_count": config.num_hidden_layers,
            },
            "capabilities": capabilities,
        }
    )


@router.post("/api/embed", response_model=Vectors, summary="Ollama's: texts made vectors.")
async def embed(body: OllamaEmbed, request: Request) -> Response:
    """One vector for each text."""
    served, facts = request.app.state.served, facts_of(request.scope)
    asked = EmbeddingRequest.model_validate(
        {"model": served_name(served, body.model), "input": body.input}
    )
    answer = await embedded(asked, served, facts)
    return json_answer(
        {
            "model": answer["model"],
            "embeddings": [one["embedding"] for one in answer["data"]],
            "total_duration": round((time.perf_counter() - facts.start_s) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": facts.prompt_tokens,
        }
    )


def _tag(served: Served, target: Target) -> dict[str, Any]:
    facts = f"{target.name} {served.fingerprint}"
    return {
        "name": target.name,
        "model": target.name,
        "modified_at": _written(served.created),
        "size": sum(tensor.size_bytes for tensor in served.llm.checkpoint.tensors.values()),
        "digest": hashlib.sha256(facts.encode()).hexdigest(),
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    record = served.llm.record
    return {
        "parent_model": "",
        "format": served.llm.checkpoint.container,
        "family": record.model_type,
        "families": [record.model_type],
        "parameter_size": _in_words(_parameters(served)),
        "quantization_level": record.quantization or record.stored_dtype or "",
    }


def _parameters(served: Served) -> int:
    return sum(math.prod(tensor.shape) for tensor in served.llm.checkpoint.tensors.values())


def _in_words(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _written(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")
