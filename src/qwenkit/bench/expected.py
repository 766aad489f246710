"""What a peer is known to reach (`peer_table.json`): a run in which it does not is void.

A slow peer makes every ratio look good. So its best turn must reach nine tenths of the table, which
is scaled from the table's machine to this one by the calibration: prefill by products, decoding by
the lesser of reads and products. Scaling holds only between machines of a kind (an engine's kernels
suit one processor better than another), so there is a table for each vendor's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qwenkit.bench.calibrate import Calibration
from qwenkit.bench.peers.spec import WeightSetting

_TABLE = Path(__file__).with_name("peer_table.json")
_TABLE_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Expectation:
    """Tokens per second that a peer must reach here, and what the table says for its machine."""

    needed: float
    table: float
    scale: float


def expected(
    engine: str,
    shape: str | None,
    weights: WeightSetting | None,
    measure: str,
    *,
    best: Calibration,
    prompt_tokens: int,
    vendor: str,
) -> Expectation | None:
    """None where the table has no such row. `best` is the best calibration around its turns,
    `vendor` the processor's as its system names it: another's than those of the tables is held to
    the first.
    """
    table = _table(vendor)
    row = _row(table, engine, shape, weights)
    if row is None or measure not in row or measure == "engine":
        return None
    if measure == "prefill" and prompt_tokens != _TABLE_PROMPT_TOKENS:
        return None
    scale = best.compute_gflop_per_s / table["compute_gflop_per_s"]
    if measure != "prefill":
        scale = min(scale, best.read_gb_per_s / table["read_gb_per_s"])
    reached = float(row[measure])
    return Expectation(reached * scale * table["share_needed"], reached, scale)


def _row(
    table: dict[str, Any], engine: str, shape: str | None, weights: WeightSetting | None
) -> dict[str, Any] | None:
    """The row of exactly this setting, or of this kind of weights where an engine has but one."""
    if engine == "transformers":  # computes in bf16 whatever the others hold
        names = ["fp32" if weights is not None and weights.name == "fp32" else "bf16"]
    else:
        names = [] if weights is None else [weights.label, weights.name]
    if engine == "onnxruntime" and weights is not None and weights.head == weights.name:
        names.append(replace(weights, head=None).label)  # its head is as the rest by itself
    rows = [r for r in table["rows"] if r["engine"] == engine and r["shape"] == shape]
    for name in names:
        for row in rows:
            if row["weights"] == name:
                found: dict[str, Any] = row
                return found
    return None


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tables


def _table(vendor: str) -> dict[str, Any]:
    machines = _tables()["machines"]
    of_vendor = [machine for machine in machines if machine["vendor"] == vendor]
    return {"share_needed": _tables()["share_needed"], **(of_vendor or machines)[0]}
