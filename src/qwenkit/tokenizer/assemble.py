"""From the parts that vocabulary files hold to one checked `Vocabulary`.

Every format but the first generation's writes regular tokens in GPT-2's printable alphabet, merges
as pairs of such tokens, and control tokens as plain text. Nothing here knows files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.bpe import (
    Merge,
    Normalization,
    PreTokenizer,
    Vocabulary,
    bytes_from_alphabet,
)

# Ids index one list, so a forged id could ask for any amount of memory.
_LARGEST_GAP = 1 << 16


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as text, not made by merges; decoding may skip it if `special`."""

    token_id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A vocabulary as a file spells it. `regular` maps tokens in the printable alphabet to ids and
    may repeat added tokens; `merges` are lines "left right" of such tokens, best first. `source` is
    the file, for messages.
    """

    source: str
    regular: Mapping[str, int]
    merges: Sequence[str]
    added: Sequence[AddedToken]
    pre_tokenizer: PreTokenizer
    normalization: Normalization
    whole_piece_first: bool = False


def assemble(parts: Parts) -> Vocabulary:
    """Check the parts against each other and put them together.

    Raises TokenizerError naming the file and the token or merge that cannot be used.
    """
    _check_ids(parts)
    _check_added(parts)
    merges = _merges(parts)
    control = _control(parts, merges)
    tokens = _tokens(parts, control)
    return Vocabulary(
        tokens=tuple(token or b"" for token in tokens),
        control={text: token.token_id for text, token in control.items()},
        special_ids=frozenset(t.token_id for t in parts.added if t.special),
        unused_ids=frozenset(i for i, token in enumerate(tokens) if token is None),
        merges=merges,
        pre_tokenizer=parts.pre_tokenizer,
        normalization=parts.normalization,
        whole_piece_first=parts.whole_piece_first,
    )


def _check_ids(parts: Parts) -> None:
    ids = [*parts.regular.values(), *(t.token_id for t in parts.added)]
    if not parts.regular:
        raise TokenizerError(f"{parts.source}: the vocabulary is empty.")
    limit = len(ids) + _LARGEST_GAP
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= limit:
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < limit)
        raise TokenizerError(
            f"{parts.source}: token id {wrong!r} is not a whole number from 0 to {limit - 1} (the "
            f"file has {len(ids)} tokens)."
        )


def _check_added(parts: Parts) -> None:
    by_id: dict[int, str] = {}
    by_text: dict[str, int] = {}
    for token in parts.added:
        if not token.text:
            raise TokenizerError(
                f"{parts.source}: control token {token.token_id} has no text and would match "
                "everywhere."
            )
        text = by_id.setdefault(token.token_id, token.text)
        token_id = by_text.setdefault(token.text, token.token_id)
        token_id = parts.regular.get(token.text, token_id)
        if text != token.text or token_id != token.token_id:
            raise TokenizerError(
                f"{parts.source}: control token {token.text!r} has id {token.token_id}, but "
                + (
                    f"{text!r} has that id too."
                    if text != token.text
                    else f"id {token_id} has that text too."
                )
            )


def _merges(parts: Parts) -> tuple[Merge, ...]:
    regular = parts.regular
    try:
        merges = tuple(
            [(regular[a], regular[b], regular[a + b]) for a, _, b in map(_halves, parts.merges)]
        )
    except KeyError:
        index, line = next((i, m) for i, m in enumerate(parts.merges) if _unknown(m, regular))
        raise TokenizerError(
            f"{parts.source}: merges[{index}]: {line[:80]!r} needs the token "
            f"{_unknown(line, regular)[0][:80]!r}, which the vocabulary does not have."
        ) from None
    if len(set(parts.merges)) != len(merges):
        seen: set[str] = set()
        for index, line in enumerate(parts.merges):
            if line in seen:
                raise TokenizerError(
                    f"{parts.source}: merges[{index}]: {line[:80]!r} is listed twice."
                )
            seen.add(line)
    return merges


_halves = methodcaller("partition", " ")


def _unknown(line: str, regular: Mapping[str, int]) -> list[str]:
    left, _, right = line.partition(" ")
    return [token for token in (left, right, left + right) if token not in regular]


def _control(parts: Parts, merges: tuple[Merge, ...]) -> dict[str, AddedToken]:
    """The added tokens that plain text does not spell. Some files list ordinary tokens among the
    added ones; those stay ordinary, unless they are called special.
    """
    made = {result for _, _, result in merges}
    made |= {i for text, i in parts.regular.items() if len(text) == 1}
    for token in parts.added:
        if token.special and token.token_id in made:
            raise TokenizerError(
                f"{parts.source}: the control token {token.text!r} (id {token.token_id}) is also a "
                "byte or the result of a merge, so that plain text could forge it."
            )
    return {t.text: t for t in parts.added if t.token_id not in made}


def _tokens(parts: Parts, control: Mapping[str, AddedToken]) -> list[bytes | None]:
    highest = max(parts.regular.values())
    highest = max([highest, *(t.token_id for t in control.values())])
    tokens: list[bytes | None] = [None] * (highest + 1)
    for added in control.values():
        tokens[added.token_id] = _utf8(parts, added)
    for text, token_id in parts.regular.items():
        if text in control:
            continue
        if tokens[token_id] is not None:
            raise TokenizerError(
                f"{parts.source}: token {text!r} has id {token_id}, which another token has too."
            )
        try:
            tokens[token_id] = bytes_from_alphabet(text)
        except UnicodeEncodeError:
            raise TokenizerError(
                f"{parts.source}: token {token_id}, {text!r}, is not written in the byte-level "
                "alphabet; qwenkit reads byte-level BPE vocabularies only."
            ) from None
        if not text:
            raise TokenizerError(f"{parts.source}: token {token_id} is empty.")
    return tokens


def _utf8(parts: Parts, token: AddedToken) -> bytes:
    try:
        return token.text.encode()
    except UnicodeEncodeError:
        raise TokenizerError(
            f"{parts.source}: control token {token.token_id}, {token.text!a}, is not valid Unicode."
        ) from None
