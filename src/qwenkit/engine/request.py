"""A generation request, what is checked before it is accepted, and a running sequence's state.

Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwenkit.errors import RequestError
from qwenkit.layers.position import Position, choose_extension, covered_tokens
from qwenkit.types.embedding import EmbeddingParams
from qwenkit.types.extension import NO_EXTENSION, Extension, RopeMode
from qwenkit.types.options import RequestOptions
from qwenkit.types.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt ids, how to continue them, and the request's place beside others. `id` names the
    request in its events. With an `embedding` the prompt is pooled into a vector and not continued;
    with `scored_from` neither: the log-probabilities of its tokens from this one on are wanted.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    options: RequestOptions = field(default_factory=RequestOptions)
    embedding: EmbeddingParams | None = None
    scored_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine can take: the model's context, the whole KV cache, the ids it can sample.

    `position` is how the model's layers know positions, `trained_tokens` the length it was trained
    for (None: the whole context), `rope` when that is extended.
    """

    context_tokens: int
    cache_tokens: int
    vocab_size: int
    position: Position = None
    trained_tokens: int | None = None
    rope: RopeMode = "per-request"

    @property
    def sequence_tokens(self) -> int:
        """Most tokens, prompt and output together, that one sequence can reach."""
        return min(self.context_tokens, self.cache_tokens)

    def extension(self, request: Request) -> Extension:
        """How `request` goes beyond the trained length: decided by its prompt and `max_tokens`.

        A request that names no `max_tokens` counts with a quarter of the trained length.
        """
        prompt, asked = len(request.prompt_ids), request.sampling.max_tokens
        longest = prompt + (max(self._trained // 4, 1) if asked is None else asked)
        return choose_extension(
            self.position,
            self.rope,
            trained_tokens=self._trained,
            prompt_tokens=prompt,
            total_tokens=min(longest, self.sequence_tokens),
        )

    def output_tokens(self, request: Request) -> int:
        """Most tokens that `request` may output: its `max_tokens`, cut where the context ends, or
        what its extension was chosen for.
        """
        covered = covered_tokens(self.position, self.rope, self.extension(request), self._trained)
        longest = self.sequence_tokens if covered is None else min(self.sequence_tokens, covered)
        room = longest - len(request.prompt_ids)
        asked = request.sampling.max_tokens
        return room if asked is None else min(room, asked)

    @property
    def _trained(self) -> int:
        return self.context_tokens if self.trained_tokens is None else self.trained_tokens


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request's place in the engine.

    `tokens` is the prompt and all output so far; the keys and values of the first `computed` of
    them are in the cache, in `blocks`, made under `extension`. `names` are those of its full
    blocks, as far as they were asked for, behind `root`, which stands for all that keys and values
    depend on beside the tokens. Rows of logits, or `hidden`: of hidden states, are wanted from
    token `rows_from` on, or None: only that of the last token.

    `arrival` counts the sequences of an engine; `reached` is the most that was ever computed,
    `charged` the tokens that its client has paid for, `cached` those that the first start found in
    the cache.
    """

    request_id: str
    tokens: list[int]
    arrival: int
    extension: Extension = NO_EXTENSION
    client: str = ""
    priority: int = 0
    rows_from: int | None = None
    hidden: bool = False
    root: bytes = b""
    names: list[bytes] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    reached: int = 0
    charged: int = 0
    cached: int | None = None

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed: 1 while decoding."""
        return len(self.tokens) - self.computed

    def missing_blocks(self, tokens: int, block_tokens: int) -> int:
        """Blocks of `block_tokens` that it lacks to hold its first `tokens` tokens."""
        return -(-tokens // block_tokens) - len(self.blocks)

    @property
    def first_row(self) -> int:
        """The first token whose row is wanted; nothing from here on is taken from the cache."""
        last = len(self.tokens) - 1
        return last if self.rows_from is None else min(last, self.rows_from)


def stop_ids(
    sampling: SamplingParams, model_stops: Iterable[int], control_tokens: Mapping[str, int]
) -> dict[int, str | int]:
    """The ids that end the output, each with what a finish event reports for it.

    `ignore_eos` puts the model's own stops out of force. A stop string that is a control token's
    name works as that token: control tokens never show in the text, where it would be looked for.
    """
    stops: dict[int, str | int] = {} if sampling.ignore_eos else {i: i for i in model_stops}
    stops |= {i: i for i in sampling.stop_token_ids}
    return stops | {control_tokens[name]: name for name in sampling.stop if name in control_tokens}


def check_request(request: Request, limits: Limits) -> None:
    """Raise RequestError, naming the field, if an engine with these limits cannot take it."""
    _check_ids("prompt_ids", request.prompt_ids, limits.vocab_size)
    if not request.prompt_ids:
        raise RequestError("prompt_ids", "the prompt is empty; give at least one token.")
    _check_length(request, limits)
    scored_from = request.scored_from
    if scored_from is not None and not 0 < scored_from < len(request.prompt_ids):
        raise RequestError(
            "scored_from",
            f"got {scored_from} for a prompt of {len(request.prompt_ids)} tokens: there must be a "
            "token before it, and one to score.",
        )
    sampling = request.sampling
    _check_ids("stop_token_ids", sampling.stop_token_ids, limits.vocab_size)
    for index, sequence in enumerate(sampling.stop_token_sequences):
        _check_ids(f"stop_token_sequences[{index}]", sequence, limits.vocab_size)
    _check_ids("logit_bias", tuple(i for i, _ in sampling.logit_bias), limits.vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, name)
        if count is not None and count > limits.vocab_size:
            raise RequestError(name, f"got {count}; the vocabulary has {limits.vocab_size} tokens.")


def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    wrong = next((i for i in ids if type(i) is not int), None)
    if wrong is not None:
        raise RequestError(name, f"expected whole numbers, got {wrong!r}.")
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise RequestError(
            name, f"token id {wrong} is outside the vocabulary; allowed: 0 to {vocab_size - 1}."
        )


def _check_length(request: Request, limits: Limits) -> None:
    """Beside the prompt there must be room for a token of an answer, where there is to be one."""
    prompt_tokens, answers = len(request.prompt_ids), request.embedding is None
    if prompt_tokens + answers <= limits.sequence_tokens:
        return
    if limits.cache_tokens < limits.context_tokens:
        place, remedy = "KV cache", "Shorten the prompt or raise kv_cache_tokens."
    else:
        place, remedy = "context", "Shorten the prompt or allow more context_tokens (--context)."
    raise RequestError(
        "prompt_ids",
        f"the prompt has {prompt_tokens} tokens, the {place} {limits.sequence_tokens}"
        f"{', of which at least one is for the answer' if answers else ''}. {remedy}",
    )
