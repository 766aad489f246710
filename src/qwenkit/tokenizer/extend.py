"""New tokens for a vocabulary: their ids and, where merges are listed, their merges.

A new token has a higher id than all others, so its merge comes after theirs: text in which no new
token comes about keeps its ids.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.bpe import Merge, ReferenceEncoder, Vocabulary
from qwenkit.tokenizer.fast import proven_ranks
from qwenkit.tokenizer.ranks import read_extra_ranks

# Ids index one list, so a forged id could ask for any amount of memory.
LARGEST_GAP = 1 << 16

_log = logging.getLogger(__name__)


def extended(vocabulary: Vocabulary, extra: Mapping[bytes, int], *, source: str) -> Vocabulary:
    """`vocabulary` and the tokens of `extra`, bytes → id; ids between that nobody has are unused.

    A token that is there already is left as it is. Raises TokenizerError naming `source` for an id
    that is taken or below another regular token's, and for a token that no merge makes.
    """
    regular = vocabulary.regular_ids()
    new = {token: token_id for token, token_id in extra.items() if token not in regular}
    for token in extra.keys() - new.keys():
        if extra[token] != regular[token]:
            _log.warning("%s: %r is token %d already.", source, token, regular[token])
    if not new:
        return vocabulary
    _check_ids(vocabulary, new, lowest=max(regular.values()) + 1, source=source)
    size = max(len(vocabulary.tokens), *(token_id + 1 for token_id in new.values()))
    tokens = [*vocabulary.tokens, *([b""] * (size - len(vocabulary.tokens)))]
    for token, token_id in new.items():
        tokens[token_id] = token
    added = range(len(vocabulary.tokens), size)
    grown = replace(
        vocabulary,
        tokens=tuple(tokens),
        unused_ids=vocabulary.unused_ids.union(added).difference(new.values()),
    )
    if vocabulary.merges is None:
        return grown
    return replace(grown, merges=vocabulary.merges + _new_merges(vocabulary, grown, new, source))


def with_extra_file(vocabulary: Vocabulary, path: Path | None) -> Vocabulary:
    """`vocabulary` and the tokens of an `extra_vocab_file`, if there is one. Raises TokenizerError
    as `read_extra_ranks` and `extended` do.
    """
    if path is None:
        return vocabulary
    return extended(vocabulary, read_extra_ranks(path), source=str(path))


def _check_ids(
    vocabulary: Vocabulary, new: Mapping[bytes, int], *, lowest: int, source: str
) -> None:
    control = {token_id: text for text, token_id in vocabulary.control.items()}
    end = len(vocabulary.tokens) + len(new) + LARGEST_GAP
    for token, token_id in new.items():
        if token_id in control:
            taken = f"is that of the control token {control[token_id]!r}"
        elif token_id < lowest:
            taken = f"is below {lowest}, so that its merge would come before that of other tokens"
        elif token_id >= end:
            taken = f"is too high for a vocabulary of {len(vocabulary.tokens)} ids"
        else:
            continue
        raise TokenizerError(
            f"{source}: id {token_id} of {token!r} {taken}. Learn the merges again from id "
            f"{len(vocabulary.tokens)} on: 'qwenkit tokenizer add-merges' with --start_id."
        )


def _new_merges(
    vocabulary: Vocabulary, grown: Vocabulary, new: Mapping[bytes, int], source: str
) -> tuple[Merge, ...]:
    """The merges of the new tokens, which a vocabulary with listed merges needs."""
    ranks = proven_ranks(ReferenceEncoder(vocabulary))
    if ranks is None or not ranks.items() <= vocabulary.regular_ids().items():
        raise TokenizerError(
            f"{source}: tokens can be added only to a vocabulary whose ids are in the order of its "
            "merges, as Qwen's are."
        )
    by_rank = ReferenceEncoder(replace(grown, merges=None))
    return tuple(
        merge_of(by_rank, token, token_id, source=source)
        for token, token_id in sorted(new.items(), key=lambda item: item[1])
    )


def merge_of(by_rank: ReferenceEncoder, token: bytes, rank: int, *, source: str) -> Merge:
    """The merge (left id, right id, result id) that makes a token of a vocabulary by ranks.

    Its bytes are encoded with the merges of lower rank only: what then stand side by side are its
    two parts. Raises TokenizerError when they are not two.
    """
    parts = by_rank.merge(token, below=rank)
    if len(parts) != 2:
        raise TokenizerError(
            f"{source}: token {rank}, {token!r}, comes about by no merge ({len(parts)} parts are "
            "left); only a .tiktoken file can hold this vocabulary."
        )
    return parts[0], parts[1], rank
