"""`TextStreamer` and `TextIteratorStreamer` as transformers' snippets use them."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenkit.compat.tokenizer import CompatTokenizer


class TextStreamer:
    """Writes text to standard output while `generate` runs. Never half a character."""

    def __init__(
        self,
        tokenizer: CompatTokenizer,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._stream = tokenizer.core.stream(skip_special=skip_special_tokens)

    def put_prompt(self, ids: list[int]) -> None:
        """The prompt, once, before the first token."""
        if not self.skip_prompt:
            self.on_finalized_text(
                self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)
            )

    def put(self, token_id: int) -> None:
        """One sampled token."""
        text = self._stream.push(token_id)
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """No more tokens."""
        self.on_finalized_text(self._stream.finish(), stream_end=True)
        self._stream = self.tokenizer.core.stream(skip_special=self.skip_special_tokens)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of certain text; override it to send text elsewhere."""
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text of a `generate` call that runs in another thread.

    `timeout` is in seconds; queue.Empty is raised when no text comes for that long.
    """

    def __init__(
        self,
        tokenizer: CompatTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self._queue: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a piece of text; the end is queued as None."""
        if text:
            self._queue.put(text)
        if stream_end:
            self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self._queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
