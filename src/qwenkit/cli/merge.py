"""`qwenkit merge`: put an adapter into a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model that the adapter was trained on.")
]
Adapter = Annotated[
    str,
    typer.Argument(metavar="ADAPTER", help="A folder in PEFT's layout, or a hub name."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Dequantize = Annotated[
    bool,
    typer.Option("--dequantize", help="Write a quantized model's weights as plain numbers."),
]
ShardSize = Annotated[
    str,
    typer.Option(
        "--shard-size",
        "--max-shard-size",
        metavar="SIZE",
        help="Largest file of weights, as 2048MB or 5GB.",
    ),
]


def command(
    model: Model,
    adapter: Adapter,
    out: Out,
    dequantize: Dequantize = False,
    shard_size: ShardSize = "5GB",
    revision: options.Revision = None,
    offline: options.Offline = False,
) -> None:
    """Write a model with a LoRA adapter in its weights, as a folder that needs no adapter.

    Tokenizer, chat template and generation config go along. Weights keep the dtype that they are
    stored in; the sum is taken in fp32 and rounded once. A quantized model is refused, for what an
    adapter learned would be lost in rounding again, unless its weights may become plain numbers.

    \b
    Examples:
      qwenkit merge Qwen/Qwen2-0.5B-Instruct ./adapter ./merged
      qwenkit merge ./model ./adapter ./merged --shard-size 2048MB
      qwenkit merge default ./adapter ./merged --dequantize
    """
    options.check_names_a_hub(model, {"--revision": revision})
    from qwenkit.merge import merge_folder  # torch, a second that --help does without
    from qwenkit.save import read_shard_size

    shard_bytes = read_shard_size(shard_size)
    with download.bars() as bars:
        source = resolve(model, offline=offline, revision=revision, progress=bars)
        folder = resolve(adapter, offline=offline, progress=bars)
    with console.progress(f"Merging {adapter} into {model} …") as show:
        files = merge_folder(
            source, folder, out, dequantize=dequantize, shard_bytes=shard_bytes, progress=show
        )
    console.say(f"{out}: {len(files)} file{'s' if len(files) > 1 else ''} of weights.")
