"""How fast a model writes, in a few seconds: for a sheet, not for a comparison of engines."""

from __future__ import annotations

import time
from pathlib import Path

from qwenkit.api import LLM
from qwenkit.types.sampling import SamplingParams

_PROMPT_TOKENS, _WRITTEN_TOKENS = 64, 32


def writing_speed(path: str | Path, *, threads: int | None = None) -> float:
    """Tokens per second of one stream after a prompt of 64 tokens, as weights are stored.

    Raises as `LLM`.
    """
    llm = LLM(str(path), threads=threads, prefix_cache=False)
    prompt = [(17 * place) % 200 for place in range(_PROMPT_TOKENS)]
    seconds = []
    for tokens in (2, 1, 1 + _WRITTEN_TOKENS):  # the first does what is done once
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens)
        start = time.perf_counter()
        llm.generate([prompt], sampling, progress=False)
        seconds.append(time.perf_counter() - start)
    llm.close()
    return _WRITTEN_TOKENS / max(seconds[2] - seconds[1], 1e-9)
