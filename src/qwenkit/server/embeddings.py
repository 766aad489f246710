"""/v1/embeddings: texts to vectors."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.api.embeddings import Vectors, embedding_requests, vectors
from qwenkit.engine.request import Request as EngineRequest
from qwenkit.errors import QwenkitError
from qwenkit.server.answers import check_finish, request_options
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts, facts_of
from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import Json, compact, json_answer
from qwenkit.server.wire.completions import prompts_of
from qwenkit.server.wire.embeddings import EmbeddingAnswer, EmbeddingRequest
from qwenkit.types.events import FinishEvent

router = group()
_AT_ONCE = 16  # of one request's inputs; the others wait, so that they take few places


@router.post("/v1/embeddings", response_model=EmbeddingAnswer, summary="Texts made vectors.")
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector for each input."""
    served: Served = request.app.state.served
    return json_answer(await embedded(body, served, facts_of(request.scope)))


async def embedded(body: EmbeddingRequest, served: Served, facts: Facts) -> dict[str, Any]:
    """The whole answer. Raises ApiError."""
    target = served.target(body.model)
    facts.model = target.name
    size = served.llm.config.hidden_size
    if body.dimensions not in (None, size):
        message = f"dimensions: vectors of this model have {size}; leave it out."
        raise ApiError(400, message, "dimensions", "invalid_value")
    prompts = prompts_of(body.input)
    if "" in prompts:
        raise ApiError(400, "input: a text is empty.", "input", "invalid_value")
    try:
        options = request_options(served, body, facts, target, body.user)
        pooling, normalize = body.pooling or "last", body.normalize is not False

        def made() -> list[EngineRequest]:
            make = served.llm.request
            requests = embedding_requests(make, prompts, pooling, normalize, options)
            for one in requests:
                served.llm.check(one)
            return requests

        requests = await served.in_thread(facts.client, made)
        found: list[Any] = []
        with served.admitted(facts.client, min(len(requests), _AT_ONCE)):
            for first in range(0, len(requests), _AT_ONCE):
                some = requests[first : first + _AT_ONCE]
                found.extend(await _computed(served, facts, some))  # its rows
    except QwenkitError as error:
        raise described(error, "input") from error
    facts.prompt_tokens = sum(len(one.prompt_ids) for one in requests)
    written = _encoded if body.encoding_format == "base64" else _listed
    shown = await served.in_thread(facts.client, lambda: [written(v) for v in found])
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(shown)]
    usage = {"prompt_tokens": facts.prompt_tokens, "total_tokens": facts.prompt_tokens}
    return {"object": "list", "model": target.name, "data": data, "usage": usage}


async def _computed(served: Served, facts: Facts, requests: Sequence[EngineRequest]) -> Vectors:
    """A row for each. Raises ApiError when one of them does not end well."""
    ends: dict[str, FinishEvent] = {}
    async with await served.submit(facts.client, requests) as stream:
        async for event in stream:
            if isinstance(event, FinishEvent):
                check_finish(event)
                if event.reason == "timeout":
                    message = "timeout_s: that time was over before the vectors were there."
                    raise ApiError(400, message, "timeout_s", "timeout")
                ends[event.request_id] = event
    return vectors([ends[one.id] for one in requests], served.llm.config.hidden_size)


def _encoded(vector: Any) -> Json:
    return Json(compact(base64.b64encode(vector.astype("<f4").tobytes()).decode()))


def _listed(vector: Any) -> Json:
    return Json(compact(vector.tolist()))
