"""The rows of text that a model is shown: read from files, rendered as the model is talked to.

A file holds conversations, in the layouts of the first generation's and of Qwen1.5's fine-tuning
scripts, one a line or all in one list; or texts, as {"text": …} a line; or plain text.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.chat.chatml import render_chatml
from qwenkit.chat.render import render
from qwenkit.errors import RequestError, UsageError
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.messages import Message, parse_messages
from qwenkit.types.record import ModelRecord

CONVERSATION_TOKENS = 8192
TEXT_TOKENS = 512
_HELD_OUT = 8  # of so many rows one is kept for judging
_MOST_HELD_OUT = 16
_MOST_JUDGED_TOKENS = 4096
_FEWEST_TOKENS = 2
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of ids to calibrate on and rows to judge by; `digest` tells them from any others.

    `note` says where the rows to judge by come from.
    """

    calibration: tuple[tuple[int, ...], ...]
    judging: tuple[tuple[int, ...], ...]
    digest: str
    note: str

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return sum(map(len, self.calibration))


def read_rows(
    files: Sequence[Path],
    judging_files: Sequence[Path],
    tokenizer: BytePairTokenizer,
    record: ModelRecord,
    *,
    most_rows: int,
    most_tokens: int | None,
) -> Rows:
    """At most `most_rows` rows of `files`, equally spaced, each of at most `most_tokens` (None:
    8,192 for a conversation, 512 for a piece of text). Without `judging_files` every eighth row, at
    most 16, is kept for judging.

    Raises UsageError naming the file and line that cannot be used, or where nothing is there.
    """
    if most_rows < 1:
        raise UsageError(f"rows: got {most_rows}; expected at least 1.")
    if most_tokens is not None and most_tokens < _FEWEST_TOKENS:
        raise UsageError(f"max_len: got {most_tokens}; expected at least {_FEWEST_TOKENS}.")
    found, judged = (
        _spaced([r for f in some for r in _rows_of(f, tokenizer, record, most_tokens)], most)
        for some, most in ((files, most_rows), (judging_files, _MOST_HELD_OUT))
    )
    if files and not found:
        raise UsageError(f"data: there is no row of two tokens in {', '.join(map(str, files))}.")
    note = "rows of " + ", ".join(file.name for file in judging_files)
    if not judging_files and len(found) >= _HELD_OUT:
        judged = found[_HELD_OUT - 1 :: _HELD_OUT][:_MOST_HELD_OUT]
        kept = {id(row) for row in judged}
        found = [row for row in found if id(row) not in kept]
        note = f"{len(judged)} rows of the data that were not calibrated on"
    elif not judging_files:
        judged, note = found, "the rows that were calibrated on: there are too few to keep any back"
    judged = _within(judged)
    text = json.dumps([found, judged]).encode()
    return Rows(
        calibration=tuple(found),
        judging=tuple(judged),
        digest=hashlib.sha256(text).hexdigest(),
        note=note,
    )


def random_rows(tokenizer: BytePairTokenizer) -> tuple[tuple[int, ...], ...]:
    """Rows that mean nothing, to look at matrices with where no text was given."""
    chosen = random.Random(0)
    most = tokenizer.vocab_size - 1
    return tuple(tuple(chosen.randint(0, most) for _ in range(128)) for _ in range(4))


def _within(rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """As much of the rows as is judged by."""
    kept, left = [], _MOST_JUDGED_TOKENS
    for row in rows:
        if left >= _FEWEST_TOKENS:
            kept.append(row[:left])
            left -= len(row)
    return kept


def _spaced(rows: list[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    if len(rows) <= most:
        return rows
    return [rows[number * len(rows) // most] for number in range(most)]


def _rows_of(
    file: Path, tokenizer: BytePairTokenizer, record: ModelRecord, most_tokens: int | None
) -> Iterator[tuple[int, ...]]:
    content = _read(file)
    items = _items(file, content)
    for where, item in [("", content)] if items is None else items:
        if isinstance(item, str):
            ids: Sequence[int] = tokenizer.encode(item)
            first = (record.bos_token_id,) if record.add_bos_token else ()
            step = (most_tokens or TEXT_TOKENS) - len(first)
            pieces = [(*first, *ids[i : i + step]) for i in range(0, len(ids), step)]
        else:
            messages = _messages(where, item)
            ids = _rendered(where, messages, tokenizer, record)
            pieces = [tuple(ids[: most_tokens or CONVERSATION_TOKENS])]
        yield from (piece for piece in pieces if len(piece) >= _FEWEST_TOKENS)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"data: {str(file)!r} cannot be read as UTF-8 text: {error}.") from error


def _items(file: Path, content: str) -> list[tuple[str, Any]] | None:
    """(where, conversation or text) of each; None for a plain text."""
    first = content.lstrip()[:1]
    if first not in ("[", "{") and file.suffix not in (".json", ".jsonl"):
        return None
    try:
        whole = json.loads(content)
        values = whole if isinstance(whole, list) else [whole]
        named = [(f"{file}, item {n}", value) for n, value in enumerate(values, 1)]
    except ValueError:
        named = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                named.append((f"{file}, line {number}", _parsed(file, number, line)))
    return [(where, _content(where, value)) for where, value in named]


def _parsed(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UsageError(f"data: {file}, line {number}: is no JSON: {error}.") from error


def _content(where: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), str):
            return value["text"]
        for key in ("messages", "conversations"):
            if isinstance(value.get(key), list):
                return value[key]
    raise UsageError(
        f'data: {where}: expected "text", "messages" or "conversations", as in '
        '{"messages": [{"role": "user", "content": "…"}, …]}.'
    )


def _messages(where: str, turns: Sequence[Any]) -> tuple[Message, ...]:
    """Of turns with "role" and "content", or with "from" and "value"."""
    read = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            role = _ROLES.get(str(turn["from"]))
            if role is None or not isinstance(turn.get("value"), str):
                raise UsageError(
                    f"data: {where}: got {str(turn)[:80]!r}; expected 'from', one of "
                    f"{', '.join(_ROLES)}, and 'value'."
                )
            turn = {"role": role, "content": turn["value"]}
        read.append(turn)
    try:
        return parse_messages(read)
    except RequestError as error:
        raise UsageError(f"data: {where}: {error}") from error


def _rendered(
    where: str,
    messages: tuple[Message, ...],
    tokenizer: BytePairTokenizer,
    record: ModelRecord,
) -> Sequence[int]:
    """A whole conversation's ids; of a base model in ChatML, which it was trained to go on from."""
    try:
        if record.chat_format == "raw":
            prompt = render_chatml(messages, tokenizer=tokenizer, add_generation_prompt=False)
            return [i for piece in prompt.pieces for i in piece.ids]
        return render(messages, tokenizer=tokenizer, record=record, add_generation_prompt=False).ids
    except RequestError as error:
        raise UsageError(f"data: {where}: {error}") from error
