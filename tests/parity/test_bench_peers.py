"""The speed bench runs beside the real llama.cpp and transformers, on a tiny random model."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.bench.shapes import shape
from qwenkit.bench.sources import Source
from qwenkit.bench.speed import SpeedSettings, measure_speed

# Looked for, not imported: the engines run in processes of their own.
ABSENT = [name for name in ("llama_cpp", "transformers") if find_spec(name) is None]
pytestmark = [pytest.mark.oracle, pytest.mark.skipif(bool(ABSENT), reason=f"needs {ABSENT}")]

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 2000,
}


@pytest.mark.parametrize("prompt_tokens", [6, 2100])  # less than a decode's, more than a batch
def test_every_engine_gives_figures_and_ratios(prompt_tokens: int, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_random_gguf(path, shape("qwen2-0.5b") | SMALL)
    result = measure_speed(
        SpeedSettings(
            source=Source(model=path),
            cache=tmp_path,
            threads=1,
            prompt_tokens=prompt_tokens,
            decode_tokens=3,
            turns=2,
            peer_python=sys.executable,
        )
    )
    assert [e.engine for e in result.engines] == ["qwenkit", "llama.cpp", "transformers"]
    assert [e.error for e in result.engines] == [None, None, None]
    for engine in result.engines:
        assert engine.peak_bytes > 1 << 20
        for measure in ("prefill", "decode"):
            speed, ratio = engine.median(measure), result.ratio(engine, measure)
            assert speed is not None
            assert speed > 0
            assert ratio is not None
            assert ratio > 0
