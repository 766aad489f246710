"""`qwenkit pull`: bring a model onto this machine, whole and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenkit.checkpoint.client_hubs import client_name
from qwenkit.checkpoint.hub import pull
from qwenkit.cli import console, download, options


def command(
    model: options.ModelName = None,
    revision: options.Revision = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep it here; then name it by the path that is printed. [default: your cache]",
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Another hub or mirror. [default: HF_ENDPOINT, else the public hub]",
        ),
    ] = None,
) -> None:
    """Download a model, or what has changed of it, and verify the checksum of every file.

    Prints where it is. A download that broke off goes on where it stopped when the command is
    given again; a damaged file is fetched anew. Only what running the model needs is fetched:
    configuration, tokenizer and weights (safetensors before pickles), never code.

    \b
    Examples:
      qwenkit pull default                             the embedded model, by pip
      qwenkit pull Qwen/Qwen2-0.5B-Instruct
      qwenkit pull Qwen/Qwen2-0.5B-Instruct-GGUF:qwen2-0_5b-instruct-q4_0.gguf
      qwenkit pull modelscope:qwen/Qwen-7B-Chat --revision v1.0.5
      qwenkit pull openmind:JiangSuAscend/Qwen1.5-7B-Chat
    """
    name = options.check_model_name(model)
    options.check_names_a_hub(name, {"--revision": revision, "--endpoint": endpoint})
    is_local = options.is_local(name)
    with download.bars() as show:
        path = pull(name, revision=revision, progress=show, cache_dir=cache_dir, endpoint=endpoint)
    if is_local:
        console.note("A path on this machine: there is nothing to download.")
    elif client_name(name) is not None:
        console.note(f"{name} is here, fetched by the client library of its hub:")
    else:
        console.note(f"{name} is here, its checksums verified:")
    console.say(str(path))
