"""Log-probabilities as OpenAI's answers have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from qwenkit.server.sse import Json, compact
from qwenkit.types.events import TokenEvent, TokenLogprob
from qwenkit.types.protocols import Tokenizer

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class LogprobWriter:
    """Entries of one answer's tokens; the tokens that end it, `stop_ids`, have none."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(stop_ids)

    def entries(self, events: Iterable[TokenEvent]) -> list[dict[str, Any]]:
        """What `logprobs.content` has of these tokens."""
        known = (
            TokenLogprob(e.token_id, e.logprob, e.top_logprobs or ())
            for e in events
            if e.logprob is not None
        )
        return [self._with_top(one) for one in known if one.token_id not in self._stops]

    def is_stop(self, token_id: int) -> bool:
        """True for a token that only ends an answer."""
        return token_id in self._stops

    def text(self, token_id: int) -> str:
        """The text of one token; bytes that are no character by themselves as U+FFFD."""
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _with_top(self, known: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(token_id, logprob) for token_id, logprob in known.top]
        return {**self._entry(known.token_id, known.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": [*data]}


class CompletionLogprobs:
    """What the `logprobs` of a completion has: four lists with an entry for each token, each as
    JSON.
    """

    def __init__(self, writer: LogprobWriter) -> None:
        self._writer = writer
        self._offset = 0  # characters of all tokens so far

    def content(self, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, list[Json]]:
        """The lists of the next tokens, each an id and what is known of it."""
        content: dict[str, list[Json]] = {name: [] for name in LISTS}
        for token_id, known in tokens:
            text = self._writer.text(token_id)
            top = None
            if known is not None:
                top = {self._writer.text(i): logprob for i, logprob in known.top}
            logprob = None if known is None else known.logprob
            for name, value in zip(LISTS, (text, logprob, top, self._offset), strict=True):
                content[name].append(Json(compact(value)))
            self._offset += len(text)
        return content
