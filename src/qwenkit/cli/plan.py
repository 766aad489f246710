"""`qwenkit plan`: whether a model fits this machine, how far, and in which weights."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenkit.cli import console, options
from qwenkit.cli.loading import options_named

if TYPE_CHECKING:
    from qwenkit.survey.plan import Plan, Row

_ORIGINS = {
    "files": "its files on this machine",
    "hub": "its config.json on the hub",
    "table": "the table of published models; no hub was asked or reached",
}
_DEFAULT_TOKENS = 4096

Weights = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Only this way: auto, as stored, or what 'chat --weights' takes. "
        "[default: compare all]",
    ),
]
KvDtype = Annotated[
    str, typer.Option(metavar="NAME", help="Keys and values: auto, fp32, bf16, int8 or int4.")
]


def command(
    model: options.ModelName = None,
    users: Annotated[int, typer.Option(metavar="N", help="Users at the same time.", min=1)] = 1,
    tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Prompt and answer together, of each user.", min=1),
    ] = _DEFAULT_TOKENS,
    weights: Weights = None,
    group_size: options.GroupSize = None,
    head_weights: options.HeadWeights = None,
    kv_dtype: KvDtype = "auto",
    devices: Annotated[
        int, typer.Option(metavar="N", help="Split over so many devices.", min=1)
    ] = 1,
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object, sizes in bytes.")
    ] = False,
) -> None:
    """Say whether a model fits this machine, how far, and in which weights, before it is loaded.

    Reads headers, or on a hub config.json only; published Qwen models are known without a hub. A
    row for each way to hold the weights: memory by part, the longest context for as many users, the
    most users at this context. "process" is measured: Python, libraries and the tokenizer. The most
    is what is resident while running or, if that is more, while loading. * marks the row that fits
    and loses least.

    \b
    Examples:
      qwenkit plan Qwen/Qwen2-7B-Instruct --users 4 --tokens 8192
      qwenkit plan Qwen/Qwen2-72B-Instruct --weights int4 --group-size 128 --devices 2
      qwenkit plan ./my-model --json
    """
    name = options.check_model_name(model)
    options.check_names_a_hub(name, {"--revision": revision})
    with console.busy("Measuring an empty process / 正在测量空进程 …"), options_named():
        plan = _plan(
            name,
            {"users": users, "tokens": tokens, "kv_dtype": kv_dtype},
            {
                "weights": weights,
                "group_size": group_size,
                "head_weights": head_weights,
                "devices": devices,
            },
            threads=threads,
            revision=revision,
            offline=offline,
        )
    if as_json:
        console.say_json(as_dictionary(plan))
    elif console.is_watched():
        _show(plan)
    else:
        for line in _lines(plan):
            console.say(line)


def _plan(
    name: str,
    work: dict[str, Any],
    choice: dict[str, Any],
    *,
    threads: int | None,
    revision: str | None,
    offline: bool,
) -> Plan:
    # torch takes seconds: bad names are refused first
    from torch import get_num_threads

    from qwenkit.bench.memory import measure_process
    from qwenkit.survey.doctor_machine import machine_memory
    from qwenkit.survey.plan import Choice, check_work, make_plan
    from qwenkit.survey.plan_memory import Workload
    from qwenkit.survey.plan_source import find_shape

    asked = Workload(**work, threads=threads or get_num_threads())
    how = Choice(**choice)
    shape = find_shape(name, offline=offline, revision=revision)
    check_work(shape, asked)
    how.plans(shape.storage)  # refuses what cannot be before the process is measured
    total, free = machine_memory()
    process = measure_process(shape.config.vocab_size, asked.threads)
    return make_plan(
        shape,
        asked,
        how,
        process_bytes=process,
        available_bytes=free,
        machine_bytes=total,
    )


def as_dictionary(plan: Plan) -> dict[str, Any]:
    """Everything known as JSON-ready data, with the sums that the table shows."""
    values = dataclasses.asdict(plan)
    for entry, row in zip(values["rows"], plan.rows, strict=True):
        entry["memory"] |= {
            "running_bytes": row.memory.running_bytes,
            "peak_bytes": row.memory.peak_bytes,
        }
    return values | {"next": next_step(plan)}


def _show(plan: Plan) -> None:
    # rich takes a quarter of a second; --json does without it.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = Console(highlight=False)
    for line in _head(plan):
        terminal.print(console.visible(line), markup=False)
    titles, *rows = _table(plan)
    table = Table(box=SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, justify="left" if title == "kept as" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    terminal.print(table)
    for line in _foot(plan):
        terminal.print(console.visible(line), markup=False)


def _lines(plan: Plan) -> list[str]:
    titles, *rows = _table(plan)
    told = ["; ".join(f"{t} {v}" for t, v in zip(titles, row, strict=True) if v) for row in rows]
    return [*_head(plan), *told, *_foot(plan)]


def _head(plan: Plan) -> list[str]:
    work = plan.work
    people = "1 user with" if work.users == 1 else f"{work.users} users, each with"
    lines = [
        f"{plan.name}: {plan.architecture}, {plan.parameters / 1e9:.2f} billion parameters, stored "
        f"as {plan.storage}, up to {plan.context_tokens:,} tokens; from {_ORIGINS[plan.origin]}.",
        f"For {people} {work.tokens:,} tokens, in GiB:",
    ]
    if work.tokens > plan.context_tokens:
        lines.insert(1, f"{work.tokens:,} tokens need --context: they extend the model.")
    return lines


def _table(plan: Plan) -> list[tuple[str, ...]]:
    parts = ("weights", "KV", "activations", "process", "loading", "most")
    return [
        ("kept as", "bits", *parts, "fits", "longest", "users"),
        *(_cells(row, row.weights == plan.recommended) for row in plan.rows),
    ]


def _cells(row: Row, recommended: bool) -> tuple[str, ...]:
    memory = row.memory
    parts = (
        memory.weight_bytes,
        memory.kv_bytes,
        memory.activation_bytes,
        memory.process_bytes,
        memory.loading_bytes,
        memory.peak_bytes,
    )
    fits = "?" if row.fits is None else "yes" if row.fits else "no"
    longest = "?" if row.longest_tokens is None else f"{row.longest_tokens:,}"
    users = "?" if row.most_users is None else str(row.most_users)
    mark = "* " if recommended else "  "
    return (
        f"{mark}{row.weights}",
        f"{row.bits_per_weight:.2f}",
        *(_gib(size) for size in parts),
        fits,
        longest,
        users,
    )


def _foot(plan: Plan) -> list[str]:
    lines = []
    if plan.available_bytes is not None and plan.machine_bytes is not None:
        free, whole = _gib(plan.available_bytes), _gib(plan.machine_bytes)
        lines.append(f"Free on this machine: {free} of {whole} GiB.")
    for row in plan.rows:
        for number, stage in enumerate(row.stages):
            lines.append(
                f"{row.weights}, device {number}: layers {stage.first_layer} to "
                f"{stage.end_layer - 1}, weights {_gib(stage.weight_bytes)}, KV "
                f"{_gib(stage.kv_bytes)}, activations {_gib(stage.activation_bytes)}, together "
                f"{_gib(stage.total_bytes)}."
            )
        for advice in row.advice:
            pad = (
                "" if advice.padded is None else f" Padded with zeros to {advice.padded:,} it does."
            )
            lines.append(
                f"{row.weights}: {advice.name} {advice.width:,} does not split evenly over "
                f"{len(row.stages)} devices ({advice.units:,} units).{pad}"
            )
    return [*lines, next_step(plan)]


def next_step(plan: Plan) -> str:
    """What to type next."""
    if plan.recommended is None:
        if plan.available_bytes is None:
            return "This machine's memory is unknown: compare the sums with what you have."
        return (
            "Nothing fits: fewer users or tokens, other weights, a smaller model, or more memory."
        )
    row = next(row for row in plan.rows if row.weights == plan.recommended)
    if plan.work.users > 1:
        from qwenkit.survey.plan_memory import BLOCK_TOKENS

        room = -(-plan.work.tokens // BLOCK_TOKENS) + 1  # a free one lets everybody start
        tokens = plan.work.users * room * BLOCK_TOKENS
        how = "" if row.weights == "auto" else f", weights={row.weights!r}"
        return f"Next: LLM({plan.name!r}{how}, kv_cache_tokens={tokens})"
    typed = ["qwenkit", "chat", plan.name]
    if row.weights != "auto":
        typed += ["--weights", row.weights]
    size = plan.download_bytes
    fetched = f" (downloads {size / 1e9:.1f} GB first)" if size else ""
    return f"Next: {shlex.join([*typed, '--context', str(plan.work.tokens)])}{fetched}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.2f}"
