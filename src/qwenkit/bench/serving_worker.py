r"""What is measured of our own engine only, in a process of its own.

    python -m qwenkit.bench.serving_worker '{"part": "prefix", "model": "…", "threads": 2, …}'

Lines on standard output are JSON: {"progress": …} as it goes, and at the end {"results": […]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from qwenkit.api import LLM
from qwenkit.bench.peers.spec import WeightSetting
from qwenkit.bench.serving_overhead import measure_overhead
from qwenkit.bench.serving_workloads import PrefixWorkload, compare_lookup, compare_prefix
from qwenkit.types.sampling import SamplingParams

OwnPart = Literal["overhead", "prefix", "lookup"]
_QWEN2 = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
OWN_PARTS: tuple[OwnPart, ...] = ("overhead", "prefix", "lookup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One part, on which model. Of "overhead" `streams` sequences take `steps` steps with each kind
    of sampling; of the others `turns` are measured.
    """

    part: OwnPart
    model: str
    threads: int
    weights: WeightSetting | None = None
    turns: int = 3
    streams: int = 8
    steps: int = 64
    prefix: PrefixWorkload = field(default_factory=PrefixWorkload)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        weights = data["weights"]
        return cls(
            **dict(data)
            | {
                "weights": weights and WeightSetting(**weights),
                "prefix": PrefixWorkload(**data["prefix"]),
            }
        )


def samplings(default: SamplingParams) -> dict[str, SamplingParams]:
    """Kinds of sampling by their names: greedy, and the model's own, named by its fields; for a
    model that has none of its own those of the generation_config.json of Qwen2-0.5B-Instruct.
    """
    if default.greedy:  # random weights
        default = SamplingParams.from_mapping(_QWEN2)
    plain = SamplingParams()
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {field: getattr(default, field) for field in fields}
    named = [f"{name} {value:g}" for name, value in values.items() if value != getattr(plain, name)]
    return {"greedy": SamplingParams(temperature=0.0), ", ".join(named) or "plain": default}


def run(task: Task, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The results of a part as plain data. Raises QwenkitError."""
    weights = task.weights
    grouped = weights is not None and weights.name in ("int4", "int8")
    with LLM(
        task.model,
        weights="auto" if weights is None else weights.name,
        group_size=weights.group_size if weights is not None and grouped else None,
        head_weights=None if weights is None else weights.head,
        threads=task.threads,
        offline=True,
    ) as llm:
        if task.part == "prefix":
            return [compare_prefix(llm, task.prefix, turns=task.turns, say=say).to_json()]
        if task.part == "lookup":
            return [each.to_json() for each in compare_lookup(llm, turns=task.turns, say=say)]
        results = []
        for name, sampling in samplings(llm.record.sampling).items():
            say(f"overhead, {name}")
            measured = measure_overhead(llm, name, sampling, streams=task.streams, steps=task.steps)
            results.append(measured.to_json())
        return results


def main() -> None:
    """Do the task that the command line gives as JSON, and write what comes of it."""
    out, sys.stdout = sys.stdout, sys.stderr

    def write(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    task = Task.from_json(json.loads(sys.argv[1]))
    write({"results": run(task, lambda what: write({"progress": what}))})


if __name__ == "__main__":
    main()
