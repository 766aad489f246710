"""`qwenkit tokenizer show`: text, ids and bytes side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from qwenkit.tokenizer import BytePairTokenizer


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token of a text: its id, its bytes, and whether it is a control token."""

    token_id: int
    data: bytes
    is_control: bool

    @property
    def shown(self) -> str:
        """The token's text with everything visible: spaces and controls as pictures, what is no
        character on its own as escapes, a mark that would join the one before on a circle.
        """
        text = "".join(_shown(c) for c in self.data.decode("utf-8", "backslashreplace"))
        return f"\u25cc{text}" if text and unicodedata.category(text[0]).startswith("M") else text


def _shown(character: str) -> str:
    if character <= " ":
        return chr(0x2400 + ord(character))  # Unicode's pictures of ASCII's controls and space
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def show(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [TEXT]",
            help="The text, or a model (name, folder, .gguf, .tiktoken or tokenizer.json) and the "
            "text; - is standard input, which is read when nothing is given.",
            show_default=False,
        ),
    ] = None,
    allow_special: Annotated[
        bool,
        typer.Option("--allow-special", help="Let control tokens in the text be control tokens."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    offline: options.Offline = False,
) -> None:
    """Show the tokens of a text: ids, bytes and text side by side, and how many there are.

    A terminal gets a table, a pipe one token a line: id, bytes in hexadecimal, text, and "control"
    where it is a control token, with tabs between. Part of a character is shown as its bytes.

    \b
    Examples:
      qwenkit tokenizer show "Hello, world"
      qwenkit tokenizer show Qwen/Qwen2-0.5B-Instruct "<|im_start|>user" --allow-special
      qwenkit tokenizer show qwen.tiktoken - < book.txt
    """
    model, text = _arguments(words or [])
    name = options.check_model_name(model)
    if text == "-":
        text = options.read_standard_input(instead="as TEXT")
    options.check_text("TEXT", text)
    with download.bars() as bars:
        path = resolve(name, offline=offline, progress=bars)
    from qwenkit.checkpoint.vocabulary import open_tokenizer  # bad names are refused first

    tokenizer = open_tokenizer(path)
    rows = token_rows(tokenizer, text, allow_special=allow_special)
    if as_json:
        console.say_json(as_dictionary(name, text, rows))
        return
    if console.is_watched():
        _table(rows)
    else:
        for row in rows:
            control = ["control"] if row.is_control else []
            console.say("\t".join([str(row.token_id), row.data.hex(" "), row.shown, *control]))
    console.note(summary(text, len(rows)))
    loss = tokenizer.round_trip_loss(text)
    if loss is not None:
        console.note(f"Not exact: {loss}")
    plain = [token for token in tokenizer.control_tokens if not allow_special and token in text]
    if plain:
        console.note(
            f"{', '.join(plain)}: plain text here; --allow-special makes control tokens of it."
        )


def _arguments(words: Sequence[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise UsageError(
            f"Got {len(words)} words after the options; expected TEXT, or MODEL and TEXT. A text "
            "with spaces needs quotes."
        )
    return (words[0] if len(words) == 2 else None), (words[-1] if words else "-")


def token_rows(
    tokenizer: BytePairTokenizer, text: str, *, allow_special: bool = False
) -> list[TokenRow]:
    """The tokens of `text`, in order."""
    ids = tokenizer.encode(text, allowed_special="all" if allow_special else ())
    control = frozenset(tokenizer.control_tokens.values())
    return [TokenRow(i, tokenizer.token_bytes(i), i in control) for i in ids]


def as_dictionary(name: str, text: str, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Everything as JSON-ready data; bytes are hexadecimal."""
    return {
        "model": name,
        "tokens": len(rows),
        "bytes": len(text.encode()),
        "characters": len(text),
        "rows": [
            {"id": r.token_id, "bytes": r.data.hex(), "text": r.shown, "control": r.is_control}
            for r in rows
        ],
    }


def summary(text: str, tokens: int) -> str:
    """How many tokens, bytes and characters, and what a token stands for on average."""
    counts = (("byte", len(text.encode())), ("character", len(text)))
    parts = [f"{_count(n, what)} ({n / tokens:.2f} a token)" for what, n in counts if tokens]
    return ", ".join([_count(tokens, "token"), *parts])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _table(rows: Sequence[TokenRow]) -> None:
    # rich takes a quarter of a second; --json does without it.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("bytes", overflow="fold")
    table.add_column("text", overflow="fold")
    for row in rows:
        text = Text(row.shown, style="reverse" if row.is_control else "")
        table.add_row(str(row.token_id), row.data.hex(" "), text)
    Console(highlight=False).print(table)
