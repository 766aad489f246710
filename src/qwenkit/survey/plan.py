"""What running a model would take on this machine, before anything is downloaded or loaded.

For each way to hold the weights: the memory by part, whether it fits, and how far it could go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qwenkit.errors import UsageError
from qwenkit.formats.plan import BITSANDBYTES_KINDS, WeightPlan
from qwenkit.layers.position import allowed_tokens, reachable_tokens
from qwenkit.survey.plan_memory import BLOCK_TOKENS, MOST_USERS, Memory, Workload, estimate
from qwenkit.survey.plan_source import Shape
from qwenkit.survey.plan_split import Advice, Stage, split_advice, stages
from qwenkit.survey.plan_weights import Weights, weigh

# As stored comes first because nothing is lost, then by what is lost. What only grows comes last.
_COMPARED = ("auto", "bf16", "int8", "int4", "fp32")
_PREFERRED = ("auto", "bf16", "int8", "llm-int8", "int4", *BITSANDBYTES_KINDS, "fp32")
_SAME_AS_STORED = {"BF16": "bf16", "F32": "fp32", "F16": "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to hold the weights. `fits` says whether `memory` does; None: the limit is unknown.

    `longest_tokens` is the longest context for as many users that fits, `most_users` how many fit
    with as many tokens; 0: none, None: unknown. `stages` are the shares of several devices.
    """

    weights: str
    bits_per_weight: float
    memory: Memory
    fits: bool | None
    longest_tokens: int | None
    most_users: int | None
    stages: tuple[Stage, ...] = ()
    advice: tuple[Advice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The rows, and what they are for. `recommended` is the row to take: the one that loses least
    of those that fit, None where none does.
    """

    name: str
    origin: str
    architecture: str
    storage: str
    parameters: int
    context_tokens: int
    download_bytes: int | None
    available_bytes: int | None
    machine_bytes: int | None
    work: Workload
    rows: tuple[Row, ...]
    recommended: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How weights may be held: `weights` None compares all ways, `devices` splits each over so
    many; the rest is as in `WeightPlan`.
    """

    weights: str | None = None
    group_size: int | None = None
    head_weights: str | None = None
    devices: int = 1

    def plans(self, storage: str) -> tuple[WeightPlan, ...]:
        """The ways to compare, for weights stored so. Raises UsageError naming the option."""
        if self.weights is not None:
            return (WeightPlan(self.weights, self.group_size, self.head_weights),)
        if self.group_size is not None or self.head_weights is not None:
            given = "head_weights" if self.group_size is None else "group_size"
            raise UsageError(f"{given}: says something only together with --weights.")
        same = _SAME_AS_STORED.get(storage)
        return tuple(WeightPlan(kind) for kind in _COMPARED if kind != same)


def check_work(shape: Shape, work: Workload) -> None:
    """Raises UsageError where no extension of the model reaches so many tokens."""
    config = shape.config
    longest = reachable_tokens(config.position, config.max_position_embeddings, "per-request")
    if work.tokens > longest:
        raise UsageError(f"tokens: got {work.tokens}; {shape.name} reaches {longest} at most.")


def make_plan(
    shape: Shape,
    work: Workload,
    choice: Choice,
    *,
    process_bytes: int,
    available_bytes: int | None,
    machine_bytes: int | None,
) -> Plan:
    """Compare the ways to hold the weights of `shape` under `work`.

    `process_bytes` is what a process takes that has a tokenizer of this size and hardly a model,
    `available_bytes` what may be filled. Raises UsageError.
    """
    check_work(shape, work)
    config = shape.config
    longest = allowed_tokens(config.position, config.max_position_embeddings)
    rows: list[Row] = []
    parameters = 0
    for plan in choice.plans(shape.storage):
        weights = weigh(shape.architecture, config, plan, shape.storage_of)
        parameters = weights.parameters
        rows.append(
            _row(
                shape, plan, weights, work, choice.devices, process_bytes, available_bytes, longest
            )
        )
    fitting = [row.weights for row in rows if row.fits]
    return Plan(
        name=shape.name,
        origin=shape.origin,
        architecture=shape.architecture.model_types[0],
        storage=shape.storage,
        parameters=parameters,
        context_tokens=longest,
        download_bytes=shape.download_bytes,
        available_bytes=available_bytes,
        machine_bytes=machine_bytes,
        work=work,
        rows=tuple(rows),
        recommended=min(fitting, key=_PREFERRED.index, default=None),
    )


def _row(
    shape: Shape,
    plan: WeightPlan,
    weights: Weights,
    work: Workload,
    devices: int,
    process_bytes: int,
    available_bytes: int | None,
    longest: int,
) -> Row:
    config = shape.config
    memory = estimate(config, weights, work, process_bytes=process_bytes)
    fits = longest_tokens = most_users = None
    if available_bytes is not None:

        def fitting(users: int, tokens: int) -> bool:
            asked = replace(work, users=users, tokens=tokens)
            needed = estimate(config, weights, asked, process_bytes=process_bytes)
            return needed.peak_bytes <= available_bytes

        fits = memory.peak_bytes <= available_bytes
        blocks = max(longest, work.tokens) // BLOCK_TOKENS
        longest_tokens = BLOCK_TOKENS * _most(
            blocks, lambda n: fitting(work.users, BLOCK_TOKENS * n)
        )
        most_users = _most(MOST_USERS, lambda n: fitting(n, work.tokens))
    split = devices > 1
    return Row(
        weights=plan.weights,
        bits_per_weight=8 * weights.held_bytes / weights.parameters,
        memory=memory,
        fits=fits,
        longest_tokens=longest_tokens,
        most_users=most_users,
        stages=stages(config, weights, work, devices) if split else (),
        advice=split_advice(config, weights, devices) if split else (),
    )


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that `holds`, as all smaller ones do; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
