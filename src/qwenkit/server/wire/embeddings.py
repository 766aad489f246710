"""What /v1/embeddings takes and answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwenkit.server.wire.base import Shape, Wire
from qwenkit.server.wire.completions import Ids

MOST_INPUTS = 2048  # OpenAI's limit
_SOME = Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)
Texts = Annotated[list[str], _SOME]
IdLists = Annotated[list[Ids], _SOME]


class EmbeddingRequest(Wire):
    """Texts, or lists of token ids, to be made vectors."""

    model: str | None = None
    input: str | Ids | Texts | IdLists
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of the numbers as little-endian 32-bit floats."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Vectors are not cut, so only their own length can be asked for."
    )
    user: Annotated[str, Field(max_length=256)] | None = None
    pooling: Literal["last", "mean"] | None = Field(
        None, description="The hidden state of the last token, or the mean of all."
    )
    normalize: bool | None = Field(None, description="Vectors of length one, as by default.")
    timeout_s: float | None = Field(None, gt=0, le=1e9)
    priority: int | None = Field(None, ge=-(10**6), le=10**6)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class Embedding(Shape):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    """Token counts of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Shape):
    """The vectors, in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
