"""`qwenkit info`: what a model is, as a table, plain lines (in a pipe) or one JSON object."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options

if TYPE_CHECKING:
    from qwenkit.survey.info import ModelInfo


def command(
    model: options.ModelName = None,
    revision: options.Revision = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object, sizes in bytes.")
    ] = False,
    offline: options.Offline = False,
) -> None:
    """Say what a model is: shapes, parameters, bytes by part, context, template, stops, licence.

    Reads the headers only: a model of any size answers at once when it is on this machine.
    Parameters are counted from the shapes; "without embeddings" leaves out the embedding and an
    untied head. One token's keys and values are given at two bytes a number. A terminal gets a
    table, a pipe one "name: value" a line.

    \b
    Examples:
      qwenkit info
      qwenkit info Qwen/Qwen2-0.5B-Instruct
      qwenkit info ./my-model --json
    """
    name = options.check_model_name(model)
    options.check_names_a_hub(name, {"--revision": revision})
    with download.bars() as show:
        path = resolve(name, offline=offline, revision=revision, progress=show)
    from qwenkit.survey.info import inspect  # torch takes seconds: bad names are refused first

    info = inspect(path)
    if as_json:
        console.say_json(as_dictionary(info, name))
    elif console.is_watched():
        _show(info, name)
    else:
        for title, value in [("model", name), *rows(info)]:
            console.say(f"{title.strip()}: {' '.join(value.splitlines())}")


def as_dictionary(info: ModelInfo, name: str) -> dict[str, Any]:
    """Everything known as JSON-ready data."""
    values = dataclasses.asdict(info)
    record = values.pop("record")
    del values["template"]  # the record has it whole, as chat_template
    return {
        "model": name,
        **values,
        "path": str(info.path),
        "stops": [{"token_id": i, "text": text} for i, text in info.stops],
        "context_tokens": record["context_tokens"],
        "trained_context_tokens": record["trained_context_tokens"],
        "vocab_size": record["vocab_size"],
        "chat_format": record["chat_format"],
        "licence": record["licence"],
        "quantization": record["quantization"],
        "sampling": record["sampling"],
        "record": record,
    }


def _show(info: ModelInfo, name: str) -> None:
    # rich takes a quarter of a second; --json does without it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(console.visible(name)), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, value in rows(info):
        table.add_row(title, Text(console.visible(value)))
    Console(highlight=False).print(table)


def rows(info: ModelInfo) -> list[tuple[str, str]]:
    """The table's rows: a title and what there is to say."""
    record = info.record
    context = f"{record.context_tokens:,} tokens"
    if record.trained_context_tokens != record.context_tokens:
        context += f" (trained for {record.trained_context_tokens:,})"
    padding = f", {info.padded_rows:,} padded rows beyond" if info.padded_rows else ""
    storages = ", ".join(f"{tag} {_size(size)}" for tag, size in info.storages.items())
    return [
        ("path", str(info.path)),
        ("architecture", f"{info.architecture}, {info.container}"),
        *((f"  {key}", _number(value)) for key, value in info.shapes.items()),
        ("parameters", _count(info.parameters)),
        ("without embeddings", _count(info.non_embedding_parameters)),
        ("bytes", f"{_size(info.stored_bytes)}: {storages}"),
        *(
            (f"  {p.name}", f"{_size(p.stored_bytes)}, {_count(p.parameters)} parameters")
            for p in info.parts
        ),
        ("quantization", record.quantization or "none"),
        ("keys and values", f"{_size(info.kv_bytes_per_token)} a token"),
        ("context", context),
        ("tokenizer", f"{record.vocab_size:,} tokens{padding}"),
        ("chat format", record.chat_format),
        ("template", f"{info.template} …" if info.template else "none"),
        ("calls of tools", record.dialect or "none"),
        ("stops", ", ".join(f"{text!r} ({i})" for i, text in info.stops) or "none"),
        ("sampling", _sampling(info)),
        ("licence", record.licence or "not stated"),
    ]


def _number(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) or value != int(value) else f"{int(value):,}"


def _sampling(info: ModelInfo) -> str:
    defaults = info.record.sampling
    changed = [
        f"{field.name} {getattr(defaults, field.name)}"
        for field in dataclasses.fields(defaults)
        if getattr(defaults, field.name) != field.default
    ]
    return ", ".join(changed) or "none of its own"


def _count(number: int) -> str:
    if number < 10**6:
        return f"{number:,}"
    unit, name = (10**9, "billion") if number >= 10**9 else (10**6, "million")
    return f"{number:,} ({number / unit:.2f} {name})"


def _size(size_bytes: int) -> str:
    amount, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return (
        f"{amount:.0f} {unit}" if unit == "B" or amount == int(amount) else f"{amount:.1f} {unit}"
    )
