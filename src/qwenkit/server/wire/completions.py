"""What /v1/completions takes and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwenkit.server.wire.base import Many, Shape
from qwenkit.server.wire.chat import UsageShape
from qwenkit.server.wire.generation import MOST_LOGPROBS, MOST_SEED, GenerationFields

# That they are of the vocabulary is looked at where the event loop does not wait for it.
Ids = Annotated[list[int], Field(fail_fast=True, min_length=1, max_length=1 << 20)]
Prompt = (
    str
    | Ids
    | Annotated[Many[str], Field(min_length=1)]
    | Annotated[Many[Ids], Field(min_length=1)]
)
MAX_TOKENS = 16  # OpenAI's default


class CompletionRequest(GenerationFields):
    """A text, or several, to be continued as they are, without a chat template."""

    refused: ClassVar[Mapping[str, str]] = {
        "suffix": "these models only write on at the end; leave it out.",
    }

    prompt: Prompt = Field(description="A text, token ids, or a list of texts or of id lists.")
    max_tokens: int | None = Field(
        None, ge=0, le=MOST_SEED, description=f"Left out: {MAX_TOKENS}. 0 only with `echo`."
    )
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class CompletionLogprobs(Shape):
    """An entry in each list for each token; the first token of all has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Shape):
    """One answer; those to the first prompt come first."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "language", "loop", "timeout", "abort"]
    stop_reason: str | int | None = None


class CompletionAnswer(Shape):
    """The whole answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageShape


def prompts_of(prompt: Any) -> list[Any]:
    """The prompts, each a text or a list of ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
