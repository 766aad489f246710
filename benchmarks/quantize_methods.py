"""Quantizes one parent in several ways and writes down what each cost, beside rounding to nearest.

    python benchmarks/quantize_methods.py PARENT OUT.json --data FILE --text FILE [WAY ...]

A WAY is METHOD-BITS-GROUP such as gptq-3-64, with "z" behind it for zero points of asymmetric
groups (rtn-3-64z), or nf4, or int8. What OUT.json holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch

from qwenkit.checkpoint.hub import resolve
from qwenkit.quantize.calibrate import read_rows
from qwenkit.quantize.compare import compare
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource

WAYS = (
    *("rtn-3-64", "gptq-3-64", "rtn-3-64z", "awq-3-64", "gptq-3-64z"),
    *("rtn-4-64", "gptq-4-64", "rtn-4-64z", "awq-4-64", "nf4", "int8"),
)


def settings_of(way: str) -> QuantizeSettings:
    """The settings that a name stands for."""
    if way in ("nf4", "int8"):
        return QuantizeSettings(method=way)
    method, bits, group, zero = re.fullmatch(r"(\w+)-(\d)-(-?\d+)(z?)", way).groups()
    symmetric = None if method == "awq" else not zero
    return QuantizeSettings(
        method=method, bits=int(bits), group_size=int(group), symmetric=symmetric
    )


def main() -> None:
    """Read the arguments, measure, write after every way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("parent")
    parser.add_argument("out", type=Path)
    parser.add_argument("ways", nargs="*", default=WAYS)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--judged-rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = LayerSource(resolve(given.parent))
    how = {"most_rows": given.rows, "most_tokens": given.max_len}
    rows = read_rows(given.data, given.text, source.tokenizer, source.record, **how)
    other = read_rows(given.text, [], source.tokenizer, source.record, **how)
    every = [*other.calibration, *other.judging]
    judged = every[:: max(1, len(every) // given.judged_rows)][: given.judged_rows]
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    for way in given.ways:
        if way in results:
            continue
        folder, began = Path(tempfile.mkdtemp()), time.perf_counter()
        with torch.inference_mode():
            work, _ = quantize(source, rows, settings_of(way), folder / "result")
            seconds = time.perf_counter() - began
            found = compare(source, LayerSource(work.result), judged, is_text=True)
        shutil.rmtree(folder)
        results[way] = {
            "parent_perplexity": found.parent_perplexity,
            "perplexity": found.own_perplexity,
            "kl": found.kl,
            "top1": found.top1,
            "bits_per_weight": found.bits_per_weight,
            "bytes": found.own_bytes,
            "judged_tokens": found.tokens,
            "calibration_tokens": rows.tokens,
            "seconds": round(seconds, 1),
            "mean_error": sum(m.error for m in found.matrices) / len(found.matrices),
            "worst": max((m.error, m.path) for m in found.matrices),
            "most_beside_rounding": max(m.beside_rounding or 0 for m in found.matrices),
            "most_row_beside": max(m.worst_row_beside or 0 for m in found.matrices),
        }
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        rise = found.own_perplexity / found.parent_perplexity - 1
        print(f"{way}: {found.own_perplexity:.4f} ({rise:+.2%}), KL {found.kl:.4f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
