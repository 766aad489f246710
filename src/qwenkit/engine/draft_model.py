"""Guesses by a smaller model of the same vocabulary (arXiv 2211.17192, 2302.01318).

It has a KV cache of its own and goes on greedily from the tokens that stand. What it guessed
wrongly is overwritten: of each sequence it knows the tokens whose keys and values it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.runner import Runner
from qwenkit.engine.speculative import DraftLength

_MOST_TOKENS = 512  # of a prompt, computed at a time


@dataclass(slots=True)
class _Sequence:
    length: DraftLength
    tokens: list[int] = field(default_factory=list)  # those that the cache holds
    blocks: list[int] = field(default_factory=list)


class DraftModel:
    """A `Drafter` with a runner over `num_blocks` blocks of `block_tokens` tokens.

    Nothing is guessed beyond `context_tokens`, nor where its cache is full. `cost` is the time of
    one of its steps in steps of the model that it guesses for.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        block_tokens: int,
        context_tokens: int,
        vocab_size: int,
        cost: float,
    ) -> None:
        self._runner = runner
        self._pool = BlockPool(num_blocks)
        self._block_tokens = block_tokens
        self._context_tokens = context_tokens
        self._vocab_size = vocab_size
        self._cost = cost
        self._sequences: dict[str, _Sequence] = {}

    def propose(
        self, sequences: Iterable[tuple[str, Sequence[int]]], room: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """See `Drafter.propose`."""
        given = dict(sequences)
        counts: dict[str, int] = {}
        for name, tokens in given.items():
            own = self._sequences.setdefault(name, _Sequence(DraftLength(self._cost)))
            longest = self._context_tokens - len(tokens)
            count = min(own.length.best(len(given)), room[name], longest)
            if count > 0 and self._make_room(own, len(tokens) + count):
                counts[name] = count
        guesses: dict[str, list[int]] = {name: [] for name in counts}
        while counts:
            wanted = {name: [*given[name], *guesses[name]] for name in counts}
            for name, token in self._next(wanted).items():
                guesses[name].append(token)
            counts = {name: n for name, n in counts.items() if len(guesses[name]) < n}
        return {name: tuple(tokens) for name, tokens in guesses.items()}

    def observe(self, request_id: str, drafted: int, accepted: int) -> None:
        """See `Drafter.observe`."""
        self._sequences[request_id].length.observe(drafted, accepted)

    def forget(self, request_id: str) -> None:
        """See `Drafter.forget`."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._pool.release(sequence.blocks)

    def _make_room(self, sequence: _Sequence, tokens: int) -> bool:
        missing = -(-tokens // self._block_tokens) - len(sequence.blocks)
        if missing > self._pool.free_blocks:
            return False
        sequence.blocks += self._pool.allocate(max(0, missing))
        return True

    def _next(self, wanted: Mapping[str, list[int]]) -> dict[str, int]:
        """The most likely token behind each of the wanted sequences."""
        for name, tokens in wanted.items():
            kept = self._sequences[name].tokens
            same = min(len(kept), len(tokens) - 1)
            while kept[:same] != tokens[:same]:  # at most as often as guesses were wrong
                same -= 1
            del kept[same:]
        found: dict[str, int] = {}
        while len(found) < len(wanted):
            chunks, budget = [], _MOST_TOKENS
            for name, tokens in wanted.items():
                own = self._sequences[name]
                start = len(own.tokens)
                part = tokens[start : start + budget]
                budget -= len(part)
                if part:
                    ends = start + len(part) == len(tokens)
                    chunks.append(
                        Chunk(name, tuple(part), start, tuple(own.blocks), int(ends), sample=ends)
                    )
            rows = self._runner.run(Plan(tuple(chunks)))[:, : self._vocab_size]
            best = iter(rows.float().argmax(-1).tolist())  # [rows]
            for chunk in chunks:
                self._sequences[chunk.request_id].tokens += chunk.token_ids
                if chunk.sample:
                    found[chunk.request_id] = next(best)
        return found
