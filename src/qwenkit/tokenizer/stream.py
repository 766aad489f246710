"""Ids to text one by one: incremental UTF-8 decoding that never gives out half a character.

A token is a string of bytes, not of characters, so the bytes of an unfinished character wait for
the tokens that complete it. The pieces, joined, are the text that decoding all ids at once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection


class Utf8Stream:
    """Collects the bytes of ids; `skipped_ids` leave no trace in the text."""

    def __init__(
        self, token_bytes: Callable[[int], bytes], *, skipped_ids: Collection[int] = ()
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now complete (may be empty).

        Raises TokenizerError when the vocabulary has no such id.
        """
        token = self._token_bytes(token_id)
        return "" if token_id in self._skipped_ids else self._decoder.decode(token)

    def finish(self) -> str:
        """Return what is left, bytes that never became a character as U+FFFD; the stream is then
        as new.
        """
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
