"""How fast quantized files of one parent write, beside the parent rounded to int4 at load.

    python benchmarks/quantized_decode.py PARENT OUT.json

Makes GPTQ, AWQ and NF4 files by rounding to nearest (speed does not look at the numbers), loads
each and lets them write in turns; medians, and ratios to int4 of the same group.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch

from qwenkit import LLM, SamplingParams
from qwenkit.kernels.cpu import kernel_info
from qwenkit.quantize.calibrate import Rows
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource

GROUP = 128
BASE = f"int4 g{GROUP}"
NO_ROWS = Rows(calibration=(), judging=(), digest="", note="")
PROMPT = "A short beginning of a text."


def make(parent: Path, folder: Path) -> dict[str, Path]:
    """Files of each format."""
    rounding = {"method": "rtn", "bits": 4, "group_size": GROUP}
    wanted = {
        "gptq": (QuantizeSettings(**rounding), False),
        "gptq, zero points": (QuantizeSettings(**rounding, symmetric=False), False),
        "awq": (QuantizeSettings(**rounding, symmetric=False), True),
        "nf4": (QuantizeSettings(method="nf4"), False),
    }
    made = {}
    for name, (settings, is_awq) in wanted.items():
        awq_layout = mock.patch.object(QuantizeSettings, "is_awq_layout", is_awq)
        with torch.inference_mode(), awq_layout:
            work, _ = quantize(LayerSource(parent), NO_ROWS, settings, folder / name)
        made[name] = work.result
    return made


def main() -> None:
    """Make the files, measure in turns, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("parent", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    sampling = SamplingParams(max_tokens=given.tokens, ignore_eos=True, temperature=0.0)
    speeds: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = make(given.parent, Path(place))
        usual = {"threads": given.threads, "kv_cache_tokens": 4096}
        int4 = {"weights": "int4", "group_size": GROUP, "head_weights": "bf16"}  # as files keep it
        loaded = {BASE: LLM(given.parent, **usual, **int4)}
        loaded |= {name: LLM(folder, **usual) for name, folder in folders.items()}
        gc.collect()
        for turn in range(given.turns + 1):
            for name, llm in loaded.items():
                for streams in (1, 8):
                    done = llm.generate([f"{PROMPT} {i}" for i in range(streams)], sampling)
                    rates = [one.timing.decode_tokens_per_second for one in done]
                    if turn:  # the first warms up
                        speeds.setdefault(name, {}).setdefault(streams, []).append(sum(rates))
        for llm in loaded.values():
            llm.close()
    medians = {
        name: {streams: statistics.median(each) for streams, each in by.items()}
        for name, by in speeds.items()
    }
    ratios = {
        name: {streams: round(rate / medians[BASE][streams], 3) for streams, rate in by.items()}
        for name, by in medians.items()
    }
    result = {
        "kernels": kernel_info().variant,
        "tokens_per_second": medians,
        f"beside {BASE}": ratios,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, by in ratios.items():
        print(f"{name}: {medians[name][1]:.1f} tokens/s, {by[1]:.2f} and {by[8]:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
