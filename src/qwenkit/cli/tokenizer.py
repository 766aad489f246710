"""`qwenkit tokenizer …`: look at tokens, add words to a vocabulary."""

from __future__ import annotations

import typer

from qwenkit.cli.tokenizer_add_merges import add_merges
from qwenkit.cli.tokenizer_show import show

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the tokens of a text; add words to a vocabulary.",
)
app.command()(show)
app.command()(add_merges)
