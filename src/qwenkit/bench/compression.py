"""Compression by language: how many bytes and characters a token stands for, and how one tokenizer
compares with another on the same texts (the figure of arXiv 2309.16609, section 2.2, on any texts).

Every count is written down when it is done: an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenkit.bench.encoders import Encoder, open_encoder
from qwenkit.bench.plot import bars_svg
from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import UsageError

ALL = "all"  # the row of all texts together


@dataclass(frozen=True, slots=True)
class TextFacts:
    """A text's sizes, and what tells it from another one."""

    bytes: int
    characters: int
    sha256: str

    @classmethod
    def of(cls, text: str) -> TextFacts:
        """Measure a text."""
        data = text.encode()
        return cls(len(data), len(text), hashlib.sha256(data).hexdigest())


@dataclass(slots=True, kw_only=True)
class CompressionTable:
    """`tokens` maps tokenizer and language to the number of tokens; the first of `tokenizers` is
    what the others are compared with.
    """

    tokenizers: tuple[str, ...]
    texts: dict[str, TextFacts]
    command: str = ""
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, TextFacts, dict[str, int]]]:
        """(language, facts, tokens by tokenizer) of each text, and of all together if there are
        several; only what is counted.
        """
        rows = [
            (
                language,
                facts,
                {t: row[language] for t, row in self.tokens.items() if language in row},
            )
            for language, facts in self.texts.items()
        ]
        if len(rows) > 1:
            total = TextFacts(
                sum(facts.bytes for facts in self.texts.values()),
                sum(facts.characters for facts in self.texts.values()),
                "",
            )
            complete = {
                t: sum(row.values()) for t, row in self.tokens.items() if len(row) == len(rows)
            }
            rows.append((ALL, total, complete))
        return rows

    def ratio(self, counted: Mapping[str, int], tokenizer: str) -> float | None:
        """Tokens of the first tokenizer over those of this one: above 1, this one needs fewer."""
        first, own = counted.get(self.tokenizers[0]), counted.get(tokenizer)
        return first / own if first and own else None

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data: settings, counts, and what follows from them."""
        derived = {
            language: {
                tokenizer: {
                    "bytes_per_token": facts.bytes / count,
                    "characters_per_token": facts.characters / count,
                    "ratio": self.ratio(counted, tokenizer),
                }
                for tokenizer, count in counted.items()
            }
            for language, facts, counted in self.rows()
        }
        return dataclasses.asdict(self) | {"compression": derived}

    def to_markdown(self) -> str:
        """The table, its conditions above it."""
        columns = [f"{t}: bytes | chars | ratio" for t in self.tokenizers]
        lines = [
            "Bytes and characters a token stands for, and tokens of the first tokenizer over "
            f"tokens of this one; `{self.command}`.",
            "",
            f"| text | bytes | {' | '.join(columns)} |",
            "| --- | ---: |" + " ---: | ---: | ---: |" * len(columns),
        ]
        for language, facts, counted in self.rows():
            cells = [c for t in self.tokenizers for c in self._cells(facts, counted, t)]
            lines.append(f"| {language} | {facts.bytes:,} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _cells(self, facts: TextFacts, counted: Mapping[str, int], tokenizer: str) -> list[str]:
        count, ratio = counted.get(tokenizer), self.ratio(counted, tokenizer)
        if count is None:
            return ["–"] * 3
        beside = "–" if ratio is None else f"{ratio:.2f}"
        return [f"{facts.bytes / count:.2f}", f"{facts.characters / count:.2f}", beside]


def read_texts(named: Sequence[str], many: Path | None) -> dict[str, str]:
    """Texts by language: of "LANG=FILE" items and of a folder's .txt files, or of a .jsonl file
    with "lang" and "text" in each line.

    Raises UsageError naming what cannot be used.
    """
    texts: dict[str, str] = {}
    for item in named:
        language, equals, file = item.partition("=")
        if not equals or not language or not file:
            raise UsageError(f"text: got {item!r}; expected LANG=FILE, such as th=thai.txt.")
        _add(texts, language, _read(Path(file)))
    if many is not None and many.is_dir():
        for path in sorted(many.glob("*.txt")):
            _add(texts, path.stem, _read(path))
    elif many is not None:
        for number, line in enumerate(_read(many).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                language, text = row["lang"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"texts: {str(many)!r}, line {number}: expected a folder of .txt files or JSON "
                    f'lines with "lang" and "text" ({error!r}).'
                ) from error
            _add(texts, str(language), str(text))
    if not texts:
        raise UsageError(
            "text: there is none. Give --text LANG=FILE, or --texts with LANG.txt files in it."
        )
    return texts


def _add(texts: dict[str, str], language: str, text: str) -> None:
    if not text or language == ALL or language in texts:
        why = "is empty" if not text else "is given twice" if language in texts else "means all"
        raise UsageError(f"text: {language!r} {why}; give each language one text.")
    texts[language] = text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"text: {str(path)!r} cannot be read as UTF-8: {error}.") from error


def read_table(path: Path, fresh: CompressionTable) -> CompressionTable:
    """What `path` holds of the same texts, or `fresh` where there is no such file.

    Raises UsageError for a file of other texts, or one that cannot be read.
    """
    if not path.exists():
        return fresh
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        texts = {language: TextFacts(**facts) for language, facts in data["texts"].items()}
        tokens = {
            tokenizer: {language: int(count) for language, count in row.items()}
            for tokenizer, row in data["tokens"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"out: {str(path)!r} is no compression table ({error}).") from error
    other = [
        name for name in fresh.texts if texts.get(name, fresh.texts[name]) != fresh.texts[name]
    ]
    if other:
        raise UsageError(
            f"out: {str(path)!r} was counted on another text of {other[0]!r}. Give another folder."
        )
    kept = {
        t: {language: n for language, n in row.items() if language in fresh.texts}
        for t, row in tokens.items()
        if t in fresh.tokenizers
    }
    return dataclasses.replace(fresh, tokens=kept)


def write_table(folder: Path, table: CompressionTable) -> None:
    """compression.json, compression.md and compression.svg in `folder`."""
    bars = {
        language: {t: facts.bytes / n for t, n in counted.items()}
        for language, facts, counted in table.rows()
    }
    files = {
        "json": json.dumps(table.to_json(), indent=1, ensure_ascii=False) + "\n",
        "md": table.to_markdown(),
        "svg": bars_svg("Bytes per token", bars),
    }
    for kind, content in files.items():
        with replacing(folder / f"compression.{kind}") as file:
            file.write(content.encode())


def measure_compression(
    texts: Mapping[str, str],
    table: CompressionTable,
    *,
    save: Callable[[CompressionTable], None],
    progress: Callable[[str, float], None] | None = None,
    open_by_name: Callable[[str], Encoder] = open_encoder,
) -> CompressionTable:
    """Fill the counts of `table` that are missing; `save` is called after every text.

    A tokenizer is opened only if it has something to count. Raises as `open_encoder`.
    """
    work = [
        (tokenizer, [name for name in texts if name not in table.tokens.get(tokenizer, {})])
        for tokenizer in table.tokenizers
    ]
    total = sum(table.texts[name].bytes for _, names in work for name in names)
    done = 0
    for tokenizer, names in work:
        encoder = open_by_name(tokenizer) if names else None
        for name in names:
            assert encoder is not None
            row = table.tokens.setdefault(tokenizer, {})
            row[name] = len(encoder.encode(texts[name]))
            done += table.texts[name].bytes
            save(table)
            if progress is not None:
                progress(f"{tokenizer} {name}", done / total)
    return table
