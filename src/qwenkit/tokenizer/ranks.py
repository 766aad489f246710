"""`.tiktoken` files: a line is a token's bytes in base64 and its rank, which is its id.

A whole vocabulary counts from 0. What was learnt later (Qwen's `extra_vocab_file`) has ranks behind
the control tokens, in a file of its own or appended to the first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.reading import read_bytes

Ranks = dict[bytes, int]


def read_ranks(path: Path, *, control_count: int) -> Ranks:
    """A whole vocabulary: ranks from 0 on that may once skip `control_count` ids or more.

    Raises TokenizerError naming the line.
    """
    return _read(path, whole=True, least_skip=control_count)


def read_extra_ranks(path: Path) -> Ranks:
    """A file of added tokens: ranks rise from anywhere. Raises TokenizerError naming the line."""
    return _read(path, whole=False, least_skip=0)


def _read(path: Path, *, whole: bool, least_skip: int) -> Ranks:
    ranks: Ranks = {}
    last, listed = -1, 0
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            spelt, written = line.split()
            token, rank = binascii.a2b_base64(spelt, strict_mode=True), int(written)
            skipped = rank - last - 1
            if (
                not token
                or skipped < 0
                or 0 < skipped < least_skip
                or (whole and rank and last < 0)
            ):
                raise ValueError
        except ValueError:
            higher = "" if least_skip else " or a higher one"
            raise TokenizerError(
                f"{path}: line {number}: expected a base64 token and its rank {last + 1}{higher}, "
                f"got {line[:60]!r}."
            ) from None
        if skipped:
            least_skip = 0
        ranks[token] = last = rank
        listed += 1
    if len(ranks) != listed or (whole and not ranks):
        raise TokenizerError(
            f"{path}: {listed} tokens, {len(ranks)} different ones; every token must be listed "
            "exactly once."
        )
    return ranks


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """One line for each token, by rank."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in by_rank]
    path.write_bytes(b"".join(lines))
