"""The options that `quantize` and `compare` share: what a result is judged by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qwenkit.quantize.report import Limits

Rows = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="At most so many rows of the data, equally spaced."),
]
MaxLen = Annotated[
    int | None,
    typer.Option(
        "--max-len",
        "--max_len",
        metavar="N",
        help="Tokens of a row. [default: 8192 of a conversation, 512 of a piece of text]",
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="Text or conversations to judge by; may be given several times."
    ),
]
Limit = Annotated[
    float,
    typer.Option(metavar="X", help="Largest rise of perplexity that is allowed, as a share."),
]
LimitKl = Annotated[
    float,
    typer.Option(metavar="X", help="Largest mean KL to the parent that is allowed, in nats."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """What a result is judged by; see `qwenkit.cli.grouped`."""

    text: Text = None
    limit: Limit = 0.5
    limit_kl: LimitKl = 0.5

    def limits(self) -> Limits:
        """As the sheet takes them. Raises UsageError."""
        from qwenkit.quantize.report import Limits  # torch takes seconds that --help does without

        return Limits(perplexity_rise=self.limit, kl=self.limit_kl)
