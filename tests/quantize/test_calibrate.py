"""The data that a model is shown: every layout that files have, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantized_made import write_conversations
from qwenkit.chat.render import render
from qwenkit.errors import UsageError
from qwenkit.quantize.calibrate import Rows, random_rows, read_rows
from qwenkit.quantize.stream import LayerSource
from qwenkit.types.messages import Message
from tiny import IM_END, IM_START, write_tiny_checkpoint

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me <|im_end|>"}]
FIRST_TURNS = [{"from": "user", "value": "Who?"}, {"from": "assistant", "value": "Me <|im_end|>"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LayerSource:
    return LayerSource(write_tiny_checkpoint(tmp_path_factory.mktemp("model")))


def _read(source: LayerSource, *files: Path, judging: tuple[Path, ...] = (), **given: Any) -> Rows:
    how: dict[str, Any] = {"most_rows": 128, "most_tokens": None} | given
    return read_rows(files, judging, source.tokenizer, source.record, **how)


def _file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"id": "1", "conversations": FIRST_TURNS}]),  # the first generation's
        json.dumps({"type": "chatml", "messages": TURNS, "source": "mine"}),  # Qwen1.5's
        json.dumps([{"messages": TURNS}], indent=2),
        json.dumps({"conversations": [{"from": "human", "value": "Who?"}, FIRST_TURNS[1]]}),
    ],
)
def test_conversations_are_rendered_as_the_model_is_talked_to(
    source: LayerSource, tmp_path: Path, content: str
) -> None:
    rows = _read(source, _file(tmp_path, "chats.json", content))
    messages = [Message("user", "Who?"), Message("assistant", "Me <|im_end|>")]
    expected = render(
        messages, tokenizer=source.tokenizer, record=source.record, add_generation_prompt=False
    ).ids
    assert rows.calibration == (expected,)
    assert expected.count(IM_END) == expected.count(IM_START) == 2  # what is said is no token


def test_texts_are_cut_into_rows(source: LayerSource, tmp_path: Path) -> None:
    words = "word " * 300
    plain = _file(tmp_path, "book.txt", words)
    rows = _read(source, plain, most_tokens=100)
    assert {len(row) for row in rows.calibration} == {100}
    assert len(rows.calibration) + len(rows.judging) == 15
    lines = _file(tmp_path, "lines.jsonl", json.dumps({"text": words}) + "\n" + json.dumps("x" * 9))
    found = _read(source, lines)
    assert [len(row) for row in found.calibration] == [512, 512, 476, 9]


def test_a_conversation_is_cut_at_the_end(source: LayerSource, tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "chats.jsonl", 3)
    whole, cut = _read(source, file), _read(source, file, most_tokens=30)
    assert cut.calibration == tuple(row[:30] for row in whole.calibration)
    assert cut.digest != whole.digest


def test_every_eighth_row_is_kept_for_judging(source: LayerSource, tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "chats.jsonl", 24)
    rows = _read(source, file)
    assert (len(rows.calibration), len(rows.judging)) == (21, 3)
    assert not set(rows.calibration) & set(rows.judging)
    assert "3 rows of the data that were not calibrated on" in rows.note
    few = _read(source, write_conversations(tmp_path / "few.jsonl", 5))
    assert few.judging == few.calibration
    assert "too few" in few.note
    other = _file(tmp_path, "other.txt", "another text " * 99)
    given = _read(source, file, judging=(other,))
    assert len(given.calibration) == 24
    assert sum(map(len, given.judging)) == 13 * 99
    assert given.note == "rows of other.txt"


def test_so_many_rows_are_taken_from_all_over(source: LayerSource, tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "chats.jsonl", 24)
    every, some = _read(source, file, judging=(file,)), _read(source, file, most_rows=6)
    assert some.calibration == every.calibration[::4]


def test_no_more_is_judged_by_than_takes_a_moment(source: LayerSource, tmp_path: Path) -> None:
    text = _file(tmp_path, "book.txt", "some words and more " * 1000)
    rows = _read(source, judging=(text,))
    assert sum(map(len, rows.judging)) == 4096
    assert rows.calibration == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"messages": []}\n{oops', r"a\.jsonl, line 2: is no JSON"),
        ("a.jsonl", '{"prompt": "x"}', 'item 1: expected "text", "messages" or "conversations"'),
        ("a.json", '[{"conversations": [{"from": "robot", "value": "x"}]}]', "one of system, user"),
        ("a.json", '[{"messages": [{"role": "robot", "content": "x"}]}]', "role: got 'robot'"),
        ("a.json", '[{"messages": [{"role": "user", "words": "x"}]}]', "words: unknown key"),
        ("a.txt", " ", "there is no row of two tokens in"),
    ],
)
def test_what_cannot_be_read_is_named(
    source: LayerSource, tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _read(source, _file(tmp_path, name, content))


def test_settings_out_of_range_are_refused(source: LayerSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows: got 0"):
        _read(source, most_rows=0)
    with pytest.raises(UsageError, match="max_len: got 1"):
        _read(source, most_tokens=1)
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        _read(source, tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        _read(source, tmp_path / "bytes.txt")


def test_a_base_model_is_shown_chatml(tmp_path: Path) -> None:
    raw = LayerSource(write_tiny_checkpoint(tmp_path / "raw", template=None))
    assert raw.record.chat_format == "raw"
    rows = _read(raw, write_conversations(tmp_path / "chats.jsonl", 1))
    assert rows.calibration[0].count(IM_START) == 3  # with a system turn


def test_random_rows_are_the_same_every_time(source: LayerSource) -> None:
    rows = random_rows(source.tokenizer)
    assert rows == random_rows(source.tokenizer)
    assert all(0 <= token < source.tokenizer.vocab_size for row in rows for token in row)
