"""/v1/embeddings: texts to vectors."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.errors import QwenkitError
from qwenkit.server.answers import request_options
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts, facts_of
from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import Json, compact, json_answer
from qwenkit.server.wire.completions import prompts_of
from qwenkit.server.wire.embeddings import EmbeddingAnswer, EmbeddingRequest

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
        several = await served.in_thread(
            facts.client, lambda: [served.llm.prompt_ids(prompt) for prompt in prompts]
        )
        vectors: list[Any] = []
        with served.admitted(facts.client, min(len(several), _AT_ONCE)):
            for first in range(0, len(several), _AT_ONCE):
                found = await served.llm.embed(
                    several[first : first + _AT_ONCE],
                    pooling=body.pooling or "last",
                    normalize=body.normalize is not False,
                    options=options,
                )
                vectors.extend(found)  # its rows
    except QwenkitError as error:
        raise described(error, "input") from error
    facts.prompt_tokens = sum(map(len, several))
    written = _encoded if body.encoding_format == "base64" else _listed
    shown = await served.in_thread(facts.client, lambda: [written(v) for v in vectors])
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(shown)]
    usage = {"prompt_tokens": facts.prompt_tokens, "total_tokens": facts.prompt_tokens}
    return {"object": "list", "model": target.name, "data": data, "usage": usage}


def _encoded(vector: Any) -> Json:
    return Json(compact(base64.b64encode(vector.astype("<f4").tobytes()).decode()))


def _listed(vector: Any) -> Json:
    return Json(compact(vector.tolist()))
