"""`qwenkit batch`: a file of requests, answered into a file."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from qwenkit.api import AsyncLLM

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
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Ask those again that failed in an earlier run; their lines in OUT.jsonl are "
        "replaced.",
    ),
]


@grouped
def command(
    source: Source,
    output: Output,
    model: Model = None,
    adapter: Adapters = None,
    served_model_name: ServedNames = None,
    at_once: AtOnce = 64,
    retry_failed: RetryFailed = False,
    kv_cache_tokens: KvCacheTokens = None,
    *,
    loaded_as: options.LoadOptions,
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server.

    Each line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}};
    the model of a body is the served name, an adapter's, or "default". Answers are written as they
    come. A run that was ended goes on when it is started again: what OUT.jsonl answers already is
    not asked anew. A request that fails is a line too, and as long as OUT.jsonl holds one the exit
    code is 1; --retry-failed asks those again.

    \b
    Examples:
      qwenkit batch questions.jsonl answers.jsonl
      qwenkit batch questions.jsonl answers.jsonl --model Qwen/Qwen2-0.5B-Instruct --weights int4
      qwenkit batch questions.jsonl answers.jsonl --retry-failed
    """
    name = options.check_model_name(model)
    adapters = read_adapters(adapter)
    check_installed("qwenkit batch")
    from qwenkit.server.batch_files import check_apart, check_input, drop_replaced, open_output

    asked = check_input(source)
    check_apart(source, output)
    file, answered = open_output(output, asked)
    with file:
        failed = sum(not is_well for is_well in answered.values())
        done = {key for key, is_well in answered.items() if is_well or not retry_failed}
        if done == asked:
            console.note(f"{output} answers all {len(asked)} requests already.")
            _end(failed)
            return
        if done:
            console.note(f"{len(done)} of {len(asked)} requests are answered already.")
        llm = loading.load_served_model(name, loaded_as, adapters, kv_cache_tokens)
        names = tuple(served_model_name or [public_name(name, llm.record.name)])
        try:
            left = len(asked) - len(done)
            failed_now = _ask(llm, names, source, file, done, left=left, at_once=at_once)
        finally:
            llm.close_now()
            if retry_failed:  # the new answers are behind the old lines, which go now
                drop_replaced(file, output, asked)
    console.note(f"{output} answers all {len(asked)} requests.")
    _end(failed_now if retry_failed else failed + failed_now)


def _ask(
    llm: AsyncLLM,
    names: tuple[str, ...],
    source: Path,
    file: IO[bytes],
    done: Container[str],
    *,
    left: int,
    at_once: int,
) -> int:
    """Answer the `left` requests that are not `done` into the file; how many of them failed."""
    from qwenkit.api.bar import bar
    from qwenkit.server.batch import run_batch
    from qwenkit.server.settings import ServerSettings

    settings = ServerSettings(
        names=names,
        max_requests=10**9,  # how many run at a time is said here
        max_body_bytes=10**9,
    )
    with bar(left, None) as advance:
        return asyncio.run(
            run_batch(llm, settings, source, file, done, at_once=at_once, advance=advance)
        )


def _end(failed: int) -> None:
    """Raises Exit with code 1 where requests of the output failed, and says how many."""
    if failed:
        console.error(
            f"{failed} of them failed; their lines say why. --retry-failed asks them again."
        )
        raise typer.Exit(1)
