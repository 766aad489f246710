"""What each way of keeping keys and values costs and changes: bytes per token, and how far a
model's answers move from those over a bf16 cache while a text decides how it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qwenkit.bench.forced import ForcedPass
from qwenkit.engine.key_guard import key_guards
from qwenkit.engine.kv import NAMED_DTYPES
from qwenkit.errors import UsageError, suggest
from qwenkit.layers.position import choose_extension
from qwenkit.load import Loaded
from qwenkit.score import kl_divergence, perplexity, token_logprobs, top1_agreement

BASELINE = "bf16"
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSettings:
    """`kinds` are the rows; the first `tokens` of the text are computed. `guarded`: keys of narrow
    caches are divided by the model's guards, as the engine does.

    Raises UsageError naming the setting on construction.
    """

    kinds: tuple[str, ...] = tuple(NAMED_DTYPES)
    tokens: int = 1024
    guarded: bool = True

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in NAMED_DTYPES:
                raise UsageError(f"kind: got {kind!r}. {suggest(kind, NAMED_DTYPES)}")
        if self.tokens < 2:
            raise UsageError(f"tokens: expected at least 2, got {self.tokens}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRow:
    """One kind. `wider_layers` counts the layers kept in more bits, as their keys have outliers.

    `mean_kl` is in nats from bf16's distribution to this one's, `agreement` the share of tokens
    after which both find the same one likeliest.
    """

    kind: str
    bytes_per_token: int
    wider_layers: int
    mean_kl: float
    agreement: float
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTable:
    """The rows, and what they were measured with."""

    model: str
    text: str
    tokens: int
    guarded: bool
    rows: tuple[KvRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The table, its conditions above it."""
        guard = "guarded" if self.guarded else "not guarded"
        lines = [
            f"Keys and values of {self.model} on {self.tokens:,} tokens of {self.text}, keys "
            f"{guard}; agreement with {BASELINE}.",
            "",
            "| kind | bytes per token | wider layers | mean KL | same top token | perplexity |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {r.kind} | {r.bytes_per_token:,} | {r.wider_layers} | {r.mean_kl:.2g} "
            f"| {r.agreement:.2%} | {r.perplexity:.4g} |"
            for r in self.rows
        ]
        return "\n".join(lines) + "\n"


def measure_kv(
    loaded: Loaded,
    ids: Sequence[int],
    settings: KvSettings,
    *,
    text: str,
    progress: Progress | None = None,
) -> KvTable:
    """Compute the text over a cache of each kind, side by side. Raises UsageError when the text has
    fewer tokens than are asked for.
    """
    if len(ids) < settings.tokens:
        raise UsageError(
            f"tokens: {settings.tokens} were asked for; the text has {len(ids)}. Give a longer "
            "text or fewer tokens."
        )
    ids = ids[: settings.tokens]
    guards = key_guards(loaded.model) if settings.guarded else None
    baseline = _pass(loaded, ids, BASELINE, None)
    passes = {kind: _pass(loaded, ids, kind, guards) for kind in settings.kinds}
    sums = {kind: torch.zeros(3, dtype=torch.float64) for kind in settings.kinds}
    for start in baseline.starts:
        expected, targets = baseline.piece(start)
        for index, (kind, own) in enumerate(passes.items()):
            logits = expected if kind == BASELINE else own.piece(start)[0]
            sums[kind] += _differences(expected, logits, targets)
            if progress is not None:
                share = (start + len(targets) * (index + 1) / len(passes)) / (len(ids) - 1)
                progress(kind, share)
    rows = [_row(kind, passes[kind], sums[kind] / (len(ids) - 1)) for kind in settings.kinds]
    return KvTable(
        model=loaded.record.name,
        text=text,
        tokens=settings.tokens,
        guarded=settings.guarded,
        rows=tuple(rows),
    )


def _pass(
    loaded: Loaded, ids: Sequence[int], kind: str, guards: Sequence[torch.Tensor | None] | None
) -> ForcedPass:
    dtype = NAMED_DTYPES[kind]
    extension = choose_extension(
        loaded.config.position,
        "per-request",
        trained_tokens=loaded.record.trained_context_tokens,
        prompt_tokens=len(ids),
        total_tokens=len(ids),
    )
    used = None if dtype.is_floating_point else guards
    return ForcedPass(loaded, ids, extension, dtype=dtype, guards=used)


def _differences(
    expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Summed over the rows: KL, agreeing tokens and log-likelihood, fp64 [3]."""
    parts = (
        kl_divergence(expected, logits),
        top1_agreement(expected, logits).double(),
        token_logprobs(logits, targets),
    )
    return torch.stack([part.sum() for part in parts])


def _row(kind: str, own: ForcedPass, means: torch.Tensor) -> KvRow:
    kl, agreement, logprob = means.tolist()
    return KvRow(
        kind=kind,
        bytes_per_token=own.cache.bytes_per_token,
        wider_layers=sum(kept is not NAMED_DTYPES[kind] for kept in own.cache.dtypes),
        mean_kl=max(kl, 0.0) if math.isfinite(kl) else kl,
        agreement=agreement,
        perplexity=perplexity(logprob),
    )
