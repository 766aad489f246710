"""Rows of logits to tokens: each row by its own penalties, biases, temperature and filters.

What the rules mean is written in `qwenkit.engine.sampler`, which works row by row; here all rows of
a step are worked on in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from qwenkit.kernels.registry import Arguments, Op

# What a row's ids are there for; each kind has a stretch of `ids` and `numbers` of its own.
SAID, OUTPUT, BIASED, BANNED = KINDS = range(4)
# The columns of `settings`.
REPETITION, PRESENCE, FREQUENCY, TEMPERATURE, TOP_K, TOP_P, MIN_P, NUMBER = SETTINGS = range(8)
LARGEST = torch.finfo(torch.float32).max
COLDEST = 1e-6  # this is greedy but for exact ties, and differences stay far from fp32's end


def _reference(
    settings: torch.Tensor,
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    numbers: torch.Tensor,
    starts: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """settings fp64 [rows, 8], logits fp32 [n, count], rows int64 [rows] (which of the logits each
    is chosen from, none twice), to int64 [rows]: the tokens, -1 where a logit is NaN or infinite.

    Kind k of row r has the `ids` (int64 [n]) and `numbers` (fp32 [n]) from starts[4 r + k] to
    starts[4 r + k + 1], starts being int64 [4 rows + 1]: ids in prompt or output, ids in the output
    and how often, ids and their biases, ids that may not come. Temperature 0 or top-k 1 is the
    likeliest token, of equal ones the first; other rows are drawn with their random number. Ids
    from `vocab_size` on are never chosen.
    """
    chosen = [
        _choose(
            logits[row],
            [(ids[a:b], numbers[a:b]) for a, b in pairwise(ends)],
            rules,
            vocab_size,
        )
        for row, ends, rules in zip(
            rows.tolist(), starts.unfold(0, 5, 4).tolist(), settings.tolist(), strict=True
        )
    ]
    return torch.tensor(chosen, dtype=torch.int64)


def _choose(
    row: torch.Tensor,
    kinds: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rules: Sequence[float],
    vocab_size: int,
) -> int:
    if not bool(torch.isfinite(row).all()):
        return -1
    scores = _adjusted(row[:vocab_size], kinds, rules)  # [vocab_size]
    top_k = int(rules[TOP_K])
    if rules[TEMPERATURE] == 0 or top_k == 1:
        return int((scores == scores.max()).nonzero()[0])
    scaled = (scores - scores.max()) / max(rules[TEMPERATURE], COLDEST)  # [vocab_size]
    if 0 < top_k < vocab_size:
        bound = scaled.sort(descending=True).values[top_k - 1]
        scaled = scaled.masked_fill(scaled < bound, -torch.inf)
    weights = scaled.exp()  # [vocab_size]
    order = torch.arange(vocab_size)
    if rules[TOP_P] < 1:
        order = weights.sort(descending=True, stable=True).indices
        heaviest = weights[order].double()  # [vocab_size]
        before = heaviest.cumsum(0) - heaviest
        count = int((before < rules[TOP_P] * weights.sum(dtype=torch.float64)).sum())
        order = order[: max(1, count)]
    kept = weights[order]  # [n]
    kept = torch.where(kept >= rules[MIN_P] * kept.max(), kept, 0.0)
    running = kept.cumsum(0, dtype=torch.float64)  # [n]
    target = rules[NUMBER] * running[-1]
    place = int(torch.searchsorted(running, target, right=True))
    return int(order[min(place, int(kept.nonzero()[-1]))])


def _adjusted(
    row: torch.Tensor, kinds: Sequence[tuple[torch.Tensor, torch.Tensor]], rules: Sequence[float]
) -> torch.Tensor:
    scores = row.clone()
    (said, _), (output, counts), (biased, biases), (banned, _) = kinds
    old = scores[said]
    penalty = rules[REPETITION]
    changed = torch.where(old > 0, old / penalty, old * penalty)
    scores[said] = changed.clamp(-LARGEST, LARGEST)
    scores[output] = scores[output] - rules[PRESENCE] - rules[FREQUENCY] * counts
    scores[biased] += biases
    scores[banned] = -LARGEST
    return scores


def _shape(
    settings: torch.Tensor,
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    numbers: torch.Tensor,
    starts: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    return settings.new_empty((len(rows),), dtype=torch.int64)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    plain = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    changes: tuple[dict[int, float], ...] = (
        {TEMPERATURE: 0.0},
        {},
        {TEMPERATURE: 0.7, TOP_K: 20, TOP_P: 0.8, REPETITION: 1.1},
        {TOP_K: 1},
        {TOP_P: 0.6, PRESENCE: 1.5, FREQUENCY: 0.5},
        {MIN_P: 0.2, REPETITION: 0.5},
        {TOP_K: 3, MIN_P: 0.3, TEMPERATURE: 2.5},
        {TOP_K: 40, TOP_P: 0.0},
        {TEMPERATURE: 1e-9},
        {TEMPERATURE: 0.0, REPETITION: 1e30, PRESENCE: 100.0},
    )
    for count, vocab_size in ((1, 1), (63, 60), (64, 64), (1000, 997), (5000, 4736)):
        logits = torch.randn(len(changes) + 2, count, generator=generator) * 4
        rows = torch.randperm(len(logits), generator=generator)[: len(changes)]
        for scale in (1.0, 0.0):  # and all of them equal
            settings, ids, numbers, starts = [], [], [], [0]
            for change in changes:
                number = float(torch.rand(1, generator=generator, dtype=torch.float64))
                settings.append([change.get(i, each) for i, each in enumerate(plain)] + [number])
                for kind in KINDS:
                    most = 1 + min(8, vocab_size // 2)
                    some = int(torch.randint(most, (1,), generator=generator))
                    found = torch.randperm(vocab_size, generator=generator)[:some]
                    ids.append(found)
                    given = torch.randint(1, 5, (some,), generator=generator).float()
                    numbers.append(given * (0.7 if kind == BIASED else 1.0))
                    starts.append(starts[-1] + some)
            yield (
                torch.tensor(settings, dtype=torch.float64),
                logits * scale,
                rows,
                torch.cat(ids),
                torch.cat(numbers),
                torch.tensor(starts),
                vocab_size,
            )
    rules = torch.tensor([[*plain, 0.5]] * 4, dtype=torch.float64)
    logits = torch.randn(4, 200, generator=generator)
    for row, place, bad in zip(
        logits, (0, 77, 199), (torch.nan, torch.inf, -torch.inf), strict=False
    ):
        row[place] = bad
    nothing = torch.empty(0, dtype=torch.int64)
    starts_of_none = torch.zeros(17, dtype=torch.int64)
    yield rules, logits, torch.arange(4), nothing, nothing.float(), starts_of_none, 150


sample_tokens = Op(
    name="sample_tokens",
    schema="(Tensor settings, Tensor logits, Tensor rows, Tensor ids, Tensor numbers, "
    "Tensor starts, int vocab_size) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
