"""The fields that say how to sample and where to stop, the same for all endpoints that answer with
text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qwenkit.server.errors import ApiError
from qwenkit.server.wire.base import Few, Many, Wire, said

MOST_SEED = 2**63 - 1
COLD = 0.01  # below this temperature the first generation's server took the most likely token
MOST_N = 128
MOST_LOGPROBS = 20
MOST_BIASES = 1024

Text = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)
]


def _few_biases(value: Any) -> Any:
    """Their number before each is looked at."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise said(f"got {len(value)} entries; allowed: {MOST_BIASES}.")
    return value


class StreamOptions(Wire):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(None, description="A last chunk with the token counts.")
    include_obfuscation: Literal[False] | None = Field(
        None, description="Chunks are not padded, so only false can be asked for."
    )


class LoopDetectionFields(Wire):
    """When an output counts as a loop; see the guide of the engine."""

    repeats: int = Field(4, ge=2, le=10**6)
    tokens: int = Field(128, ge=2, le=10**9)
    longest: int = Field(256, ge=1, le=4096)


class GenerationFields(Wire):
    """What is left out is as the model's own generation_config has it."""

    model: str | None = Field(
        None, description="A name of /v1/models; left out: the model that is served."
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="0, like all below 0.01, takes the most likely token."
    )
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_SEED, description="0 is off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Biases, BeforeValidator(_few_biases)] | None = Field(
        None, description="Token ids, as texts of digits, and what is added to their logits."
    )
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    n: int | None = Field(None, ge=1, le=MOST_N)
    best_of: int | None = Field(
        None,
        ge=1,
        le=MOST_N,
        description="So many are sampled; the n with the highest mean log-probability are given.",
    )
    max_tokens: int | None = Field(None, ge=0, le=MOST_SEED)
    min_tokens: int | None = Field(None, ge=0, le=MOST_SEED)
    stop: Text | Many[Text] | None = None
    stop_token_ids: Many[Annotated[int, Field(ge=0, le=MOST_SEED)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Clients share the engine evenly: a client is a key and a user."
    )
    guided_json: dict[str, Any] | Text | Literal[True] | None = Field(
        None, description="The output is JSON of this schema; true: any object."
    )
    guided_regex: Text | None = None
    guided_choice: Annotated[Many[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = Field(None, description="A Lark grammar whose rule is start.")
    allowed_scripts: Few[Text] | Text | None = Field(
        None, description="Unicode scripts; the output ends before a letter of another one."
    )
    loop_detection: bool | LoopDetectionFields | None = None
    timeout_s: float | None = Field(None, gt=0, le=1e9)
    priority: int | None = Field(None, ge=-(10**6), le=10**6)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Prompts of one salt share what is cached of them."
    )


_SAME_NAMES = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "allowed_scripts",
    "loop_detection",
)


def sampling_changes(given: GenerationFields, max_tokens: int | None) -> dict[str, Any]:
    """The fields as changes to a model's own sampling. Raises ApiError."""
    changes = {name: getattr(given, name) for name in _SAME_NAMES}
    if given.temperature is not None:
        changes["temperature"] = 0.0 if given.temperature < COLD else given.temperature
    if isinstance(given.loop_detection, LoopDetectionFields):
        changes["loop_detection"] = given.loop_detection.model_dump()
    changes["max_tokens"] = max_tokens
    changes["constraint"] = _constraint(given)
    return {name: value for name, value in changes.items() if value is not None}


def _constraint(given: GenerationFields) -> dict[str, Any] | None:
    """What the output must be, if one of the guided_ fields says so."""
    kinds = {
        "guided_json": "json_schema",
        "guided_regex": "regex",
        "guided_choice": "choice",
        "guided_grammar": "grammar",
    }
    found = [name for name in kinds if getattr(given, name) is not None]
    if len(found) > 1:
        raise ApiError(400, f"Got both {' and '.join(found)}; give one.", found[1], "invalid_value")
    return {kinds[name]: getattr(given, name) for name in found} or None


def check_stream_options(given: GenerationFields) -> bool:
    """Whether the stream is to end with token counts. Raises ApiError for options of no stream."""
    options = given.stream_options
    if options is not None and not given.stream:
        raise ApiError(
            400,
            'stream_options: only a stream has options; add "stream": true.',
            "stream_options",
            "invalid_value",
        )
    return options is not None and bool(options.include_usage)
