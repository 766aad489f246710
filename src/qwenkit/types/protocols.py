"""The shapes that rooms agree on without importing each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

AllowedSpecial = Literal["all"] | Collection[str]


class TokenStream(Protocol):
    """Turns ids into text one by one and never gives out half a character."""

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now complete (may be empty)."""
        ...

    def finish(self) -> str:
        """Return what is left; bytes that never became a character are U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text ⇄ ids. Every id below `vocab_size` can be decoded; a model may have more (padding)
    rows.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Text → id of every token that text can only become when it is allowed by name."""
        ...

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """Text to ids. Control tokens in `text` stay plain text unless allowed by name or by
        "all".
        """
        ...

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = False, errors: str = "replace"
    ) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for (a control token's name in UTF-8)."""
        ...

    def stream(self, *, skip_special: bool = True) -> TokenStream: ...
