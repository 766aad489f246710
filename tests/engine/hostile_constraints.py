"""A program that meets all constraints that mean harm, and says what they cost.

It prints, for each, a JSON line: name, "refused" or "served", tokens that came
and the most memory, in MB, that it took beyond what there was before.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

from qwenkit.bench.reliability.hostile_constraints import CASES


def main() -> None:
    from qwenkit.engine.constrain import Grammars
    from qwenkit.errors import RequestError
    from qwenkit.tokenizer import from_tiktoken
    from qwenkit.types.constraint import Constraint

    spec = importlib.util.find_spec("dashscope")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = from_tiktoken(folder / "resources" / "qwen.tiktoken")
    grammars, end = Grammars(tokenizer, tokenizer.vocab_size), 151643
    grammars.matcher(Constraint.from_mapping({"json_schema": True}), [end])  # the vocabulary, once
    generator = random.Random(0)
    for name, given in CASES:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before, tokens = _status_mb("VmRSS"), 0
        outcome = "refused"
        try:
            matcher = grammars.matcher(Constraint.from_mapping(given), [end])
            outcome = "served"
            while tokens < 100:
                token_id = int(generator.choice(matcher.mask().nonzero()[0]))
                matcher.consume(token_id)
                tokens += 1
                if token_id == end:
                    break
        except RequestError:  # of this constraint, or of a text that it turned out too hard for
            pass
        peak = _status_mb("VmHWM") - before
        line = {"name": name, "outcome": outcome, "tokens": tokens, "peak_mb": round(peak, 1)}
        sys.stdout.write(json.dumps(line) + "\n")


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
