"""The tokenizer that the rest of the program holds: text ⇄ ids over one vocabulary.

Text can never forge a control token: what reads like one is encoded as plain text unless the caller
allows it by name, whether or not the vocabulary's files call the token special.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, get_args

import tiktoken.core

from qwenkit.errors import TokenizerError, suggest
from qwenkit.tokenizer.bpe import ReferenceEncoder, Vocabulary, compose
from qwenkit.tokenizer.fast import FastEncoder, proven_ranks
from qwenkit.tokenizer.stream import Utf8Stream
from qwenkit.types.protocols import AllowedSpecial

DecodeErrors = Literal["replace", "ignore", "strict", "backslashreplace"]
Backend = Literal["tiktoken", "reference"]


class BytePairTokenizer:
    """Byte-level BPE tokenizer; implements `qwenkit.types.protocols.Tokenizer`.

    tiktoken does the work where the vocabulary is shown to allow it, the reference elsewhere; ids
    are the same.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.reference = ReferenceEncoder(vocabulary)
        ranks = proven_ranks(self.reference)
        self._fast = None if ranks is None else FastEncoder(self.reference, ranks)
        self._control = MappingProxyType(dict(vocabulary.control))
        self._all_control = frozenset(self._control)
        self._control_texts = {i: text for text, i in vocabulary.control.items()}

    def __repr__(self) -> str:
        return (
            f"BytePairTokenizer({self.vocab_size} ids, {len(self._control)} control tokens, "
            f"pre-tokenizer {self.vocabulary.pre_tokenizer.name}, {self.backend})"
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[Vocabulary]]:
        return BytePairTokenizer, (self.vocabulary,)

    @property
    def backend(self) -> Backend:
        """What encodes plain text."""
        return "reference" if self._fast is None else "tiktoken"

    @property
    def vocab_size(self) -> int:
        """Ids in use, control tokens included; a model's padding rows lie at and above it."""
        return len(self.vocabulary.tokens)

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Text → id of every token that text can only become when it is allowed by name."""
        return self._control

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding with `skip_special` leaves out."""
        return self.vocabulary.special_ids

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = (),
        disallowed_special: AllowedSpecial = (),
    ) -> list[int]:
        """Text to ids. Control tokens in `text` stay plain text unless allowed by name or "all".

        `disallowed_special` names control tokens whose text is refused; "all" means all that are
        not allowed. Raises TokenizerError (a ValueError) for those, for an allowed name that is no
        control token, and for text that is not valid Unicode.
        """
        _check_text(text)
        normalization = self.vocabulary.normalization
        if normalization == "text":
            text = compose(text)
        allowed = self._names(allowed_special)
        if disallowed_special:
            self._refuse(text, allowed, disallowed_special)
        ids: list[int] = []
        for part, control_id in self._segments(text, allowed):
            if control_id is not None:
                ids.append(control_id)
            elif part:
                ids += self._encode_plain(compose(part) if normalization == "segments" else part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        return self.reference.encode(text) if self._fast is None else self._fast.encode(text)

    def _names(self, allowed: AllowedSpecial) -> frozenset[str]:
        if allowed == "all":
            return self._all_control
        if isinstance(allowed, str):
            raise TokenizerError(
                f"allowed_special: got {allowed!r}; expected 'all' or a collection of names."
            )
        names = frozenset(allowed)
        for name in names:
            self.control_id(name)
        return names

    def _refuse(self, text: str, allowed: frozenset[str], disallowed: AllowedSpecial) -> None:
        if disallowed == "all":
            disallowed = self._all_control - allowed
        elif isinstance(disallowed, str):
            raise TokenizerError(
                f"disallowed_special: got {disallowed!r}; expected 'all' or a collection of names."
            )
        names = frozenset(disallowed)
        if names and (match := _any_of(names).search(text)):
            try:
                tiktoken.core.raise_disallowed_special_token(match.group())
            except ValueError as error:
                raise TokenizerError(str(error)) from None

    def _segments(self, text: str, allowed: frozenset[str]) -> Iterator[tuple[str, int | None]]:
        """Stretches of plain text (id None) and control tokens, in order; longest match first."""
        position = 0
        if allowed:
            for match in _any_of(allowed).finditer(text):
                yield text[position : match.start()], None
                yield match.group(), self._control[match.group()]
                position = match.end()
        yield text[position:], None

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = False, errors: str = "replace"
    ) -> str:
        """Ids to text. `errors` says what becomes of bytes that are no character.

        Raises TokenizerError for an id that the vocabulary does not have, and, with
        errors="strict", for bytes that are not UTF-8.
        """
        if errors not in get_args(DecodeErrors):
            raise TokenizerError(
                f"errors: got {errors!r}. {suggest(errors, get_args(DecodeErrors))}"
            )
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join([self.token_bytes(i) for i in ids if i not in skipped])
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"these ids are not valid UTF-8: {error}. Pass errors='replace' to see the text."
            ) from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for (a control token's name in UTF-8).

        Raises TokenizerError when the vocabulary has no such id.
        """
        try:
            if token_id >= 0:
                return self.vocabulary.tokens[token_id]
        except (IndexError, TypeError):
            pass
        raise TokenizerError(
            f"token id {token_id!r} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}. "
            "Rows of a model above that are padding and must not be sampled."
        )

    def token(self, token_id: int) -> bytes | str:
        """One token: the text of a control token, the bytes of any other."""
        text = self._control_texts.get(token_id)
        return self.token_bytes(token_id) if text is None else text

    def stream(self, *, skip_special: bool = True) -> Utf8Stream:
        """A decoder that takes ids one by one."""
        return Utf8Stream(self.token_bytes, skipped_ids=self.special_ids if skip_special else ())

    def get_vocab(self) -> dict[bytes | str, int]:
        """Bytes of every regular token and text of every control token → id, a new dictionary."""
        vocabulary: dict[bytes | str, int] = {}
        vocabulary.update(self.reference.regular.items())
        vocabulary.update(self._control)
        return vocabulary

    def control_id(self, text: str) -> int:
        """The id of a control token. Raises TokenizerError naming the nearest one."""
        found = self._control.get(text)
        if found is None:
            raise TokenizerError(
                f"{text!r} is not a control token of this vocabulary. "
                f"{suggest(str(text), self._control)}"
            )
        return found

    def add_tokens(self, tokens: Iterable[str], *, special: bool = False) -> int:
        """Accept tokens that are control tokens already and return 0, the number added.

        Raises TokenizerError for anything else: a vocabulary is what its files say.
        """
        names = [tokens] if isinstance(tokens, str) else list(tokens)
        if names and not special:
            raise TokenizerError(
                "Adding regular tokens is not supported: a token comes about by merges. 'qwenkit "
                "tokenizer add-merges' learns them from words and their frequencies. Refused: "
                f"{names!r}."
            )
        for name in names:
            if name not in self._control:
                raise TokenizerError(
                    f"Adding unknown special tokens is not supported: {name!r} is not a control "
                    f"token of this vocabulary. {suggest(str(name), self._control)} New words "
                    "become regular tokens by 'qwenkit tokenizer add-merges'."
                )
        return 0

    def round_trip_loss(self, text: str) -> str | None:
        """None when encoding and decoding give `text` back byte for byte, else a sentence saying
        what changes.
        """
        _check_text(text)
        normalised = text if self.vocabulary.normalization == "none" else compose(text)
        losses = []
        if normalised != text:
            losses.append("characters are composed to Unicode form NFC")
        missing = self.reference.missing_bytes
        if missing and (lost := {c for c in normalised if not set(c.encode()).isdisjoint(missing)}):
            losses.append(f"the vocabulary cannot spell {', '.join(map(ascii, sorted(lost)))}")
        return f"the text does not survive exactly: {'; '.join(losses)}." if losses else None


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text: expected str, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text: half of a surrogate pair, {text[error.start]!a}, at character {error.start} is "
            "not a Unicode character; replace it before encoding."
        ) from None


@lru_cache(maxsize=64)
def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """A pattern for the longest of `names` at the leftmost place."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda n: (-len(n), n)))))
