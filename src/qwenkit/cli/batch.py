"""`qwenkit batch`: a file of requests, answered into a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.cli import console, loading, options
from qwenkit.cli.grouped import grouped
from qwenkit.cli.serving import (
    Adapters,
    KvCacheTokens,
    ServedNames,
    check_installed,
    public_name,
    read_adapters,
)

Source = Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line.")]
Output = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, one a line.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Name on the hub, folder or .gguf file. [default: the embedded model]",
    ),
]
AtOnce = Annotated[
    int, typer.Option(metavar="N", min=1, max=4096, help="Requests that run at one time.")
]


@grouped
def command(
    source: Source,
    output: Output,
    model: Model = None,
    adapter: Adapters = None,
    served_model_name: ServedNames = None,
    at_once: AtOnce = 64,
    kv_cache_tokens: KvCacheTokens = None,
    *,
    loaded_as: options.LoadOptions,
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server.

    Each line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}};
    the model of a body is the served name, an adapter's, or "default". Answers are written as they
    come. A run that was ended goes on when it is started again: what OUT.jsonl answers already is
    not asked anew. A request that fails is a line too, and the exit code is then 1.

    \b
    Examples:
      qwenkit batch questions.jsonl answers.jsonl
      qwenkit batch questions.jsonl answers.jsonl --model Qwen/Qwen2-0.5B-Instruct --weights int4
    """
    name = options.check_model_name(model)
    adapters = read_adapters(adapter)
    check_installed("qwenkit batch")
    from qwenkit.server.batch_files import check_input, open_output
    from qwenkit.server.settings import ServerSettings

    asked = check_input(source)
    file, done = open_output(output, asked)
    with file:
        if done == asked:
            console.note(f"{output} answers all {len(asked)} requests already.")
            return
        if done:
            console.note(f"{len(done)} of {len(asked)} requests are answered already.")
        llm = loading.load_served_model(name, loaded_as, adapters, kv_cache_tokens)
        from qwenkit.api.bar import bar
        from qwenkit.server.batch import run_batch

        settings = ServerSettings(
            names=tuple(served_model_name or [public_name(name, llm.record.name)]),
            max_requests=10**9,  # how many run at a time is said here
            max_body_bytes=10**9,
        )

        try:
            with bar(len(asked) - len(done), None) as advance:
                failed = asyncio.run(
                    run_batch(llm, settings, source, file, done, at_once=at_once, advance=advance)
                )
        finally:
            llm.close_now()
    console.note(f"{output} answers all {len(asked)} requests.")
    if failed:
        console.error(f"{failed} of them failed; their lines say why.")
        raise typer.Exit(1)
