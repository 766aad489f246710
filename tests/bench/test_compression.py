"""Compression tables and encoding speed: their numbers, files, resuming, and what they refuse."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from qwenkit.bench.compression import (
    CompressionTable,
    TextFacts,
    measure_compression,
    read_table,
    read_texts,
    write_table,
)
from qwenkit.bench.encoders import Encoder, open_encoder, peer_of
from qwenkit.bench.encoding_speed import measure_encoding
from qwenkit.cli.main import app
from qwenkit.errors import MissingDependencyError, UsageError
from qwenkit.tokenizer import BytePairTokenizer, from_tiktoken, write_folder
from tiny import write_tiny_checkpoint

TEXTS = {"en": "hello world", "th": "สวัสดี"}  # 11 and 18 bytes, 11 and 6 characters


def encoder(name: str) -> Encoder:
    """ "bytes" gives a token for each byte, "pairs" one for every two."""
    step = {"bytes": 1, "pairs": 2}[name]
    return Encoder(name, lambda text: list(text.encode()[::step]))


def fresh(*tokenizers: str) -> CompressionTable:
    facts = {language: TextFacts.of(text) for language, text in TEXTS.items()}
    return CompressionTable(tokenizers=tokenizers or ("bytes", "pairs"), texts=facts)


def measured() -> CompressionTable:
    return measure_compression(TEXTS, fresh(), save=lambda table: None, open_by_name=encoder)


def test_the_figures() -> None:
    told = measured().to_json()
    assert told["tokens"] == {"bytes": {"en": 11, "th": 18}, "pairs": {"en": 6, "th": 9}}
    assert told["compression"]["th"]["pairs"] == {
        "bytes_per_token": 2.0,
        "characters_per_token": 6 / 9,
        "ratio": 2.0,
    }
    assert told["compression"]["all"]["pairs"]["ratio"] == 29 / 15
    assert told["compression"]["en"]["bytes"]["ratio"] == 1.0


def test_an_interrupted_count_goes_on(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def save(table: CompressionTable) -> None:
        write_table(tmp_path, table)
        if "pairs" in table.tokens:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_compression(TEXTS, fresh(), save=save, open_by_name=encoder)
    kept = read_table(tmp_path / "compression.json", fresh())
    assert kept.tokens == {"bytes": {"en": 11, "th": 18}, "pairs": {"en": 6}}
    opened: list[str] = []
    steps: list[tuple[str, float]] = []

    def opening(name: str) -> Encoder:
        opened.append(name)
        return encoder(name)

    done = measure_compression(
        TEXTS,
        kept,
        save=lambda table: None,
        progress=lambda what, share: steps.append((what, share)),
        open_by_name=opening,
    )
    assert opened == ["pairs"]
    assert steps == [("pairs th", 1.0)]
    assert done.tokens == measured().tokens


def test_the_files_say_the_same(tmp_path: Path) -> None:
    table = measured()
    write_table(tmp_path, table)
    text = (tmp_path / "compression.md").read_text()
    assert "| en | 11 | 1.00 | 1.00 | 1.00 | 1.83 | 1.83 | 1.83 |" in text
    assert "| all | 29 | 1.00 | 0.59 | 1.00 | 1.93 | 1.13 | 1.93 |" in text
    picture = ElementTree.fromstring((tmp_path / "compression.svg").read_text())
    bars = picture.findall("{http://www.w3.org/2000/svg}path")
    assert len(bars) == 3 * 2 + 2  # three rows of two, and the legend
    lengths = [float(b.attrib["d"].split("H")[1]) - 64 for b in bars[:2]]
    assert lengths[1] / lengths[0] == pytest.approx(11 / 6, rel=0.01)
    assert read_table(tmp_path / "compression.json", fresh()).tokens == table.tokens
    assert "pairs" not in read_table(tmp_path / "compression.json", fresh("bytes")).tokens


def test_other_texts_and_other_files_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, measured())
    other = fresh()
    other.texts["en"] = TextFacts.of("hello")
    with pytest.raises(UsageError, match="was counted on another text of 'en'"):
        read_table(tmp_path / "compression.json", other)
    (tmp_path / "compression.json").write_text("[]")
    with pytest.raises(UsageError, match="no compression table"):
        read_table(tmp_path / "compression.json", fresh())


def test_texts_are_read_from_files_folders_and_lines(tmp_path: Path) -> None:
    for language, text in TEXTS.items():
        (tmp_path / f"{language}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"lang": language, "text": text}) for language, text in TEXTS.items()]
    (tmp_path / "all.jsonl").write_text("\n".join([*lines, "", ""]))
    assert read_texts([], tmp_path) == TEXTS
    assert read_texts([], tmp_path / "all.jsonl") == TEXTS
    more = read_texts([f"de={tmp_path / 'en.txt'}"], tmp_path)
    assert list(more) == ["de", "en", "th"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([], r"text: there is none"),
        (["en"], r"expected LANG=FILE"),
        (["en={folder}/gone.txt"], r"cannot be read as UTF-8"),
        (["en={folder}/empty.txt"], r"'en' is empty"),
        (["all={folder}/a.txt"], r"'all' means all"),
        (["en={folder}/a.txt", "en={folder}/a.txt"], r"'en' is given twice"),
    ],
)
def test_texts_that_cannot_be(tmp_path: Path, named: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=message):
        read_texts([item.format(folder=tmp_path) for item in named], None)


def test_lines_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"lang": "en"}\n')
    with pytest.raises(UsageError, match=r"line 1: expected a folder of \.txt files or JSON"):
        read_texts([], tmp_path / "x.jsonl")


def test_speed_is_the_median_of_turns() -> None:
    seconds = itertools.chain([0, 1, 1, 2, 2, 4, 4, 5, 5, 8, 8, 8.5])
    order: list[str] = []

    def named(name: str) -> Encoder:
        def encode(text: str) -> Sequence[int]:
            order.append(name)
            return [len(name)]

        return Encoder(name, encode)

    results = measure_encoding(
        [named("ours"), named("peer")], "x" * 10**6, turns=3, clock=lambda: next(seconds)
    )
    assert order == ["ours", "peer"] * 4  # one not measured, then turns
    assert [r.turns for r in results] == [(1.0, 0.5, 1 / 3), (1.0, 1.0, 2.0)]
    assert [r.to_json()["mb_per_s"] for r in results] == [0.5, 1.0]
    assert [r.same_ids for r in results] == [True, True]
    differ = measure_encoding([named("ours"), named("other")], "x", turns=1)
    assert not differ[1].same_ids


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> BytePairTokenizer:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("vocabulary"))
    with (folder / "qwen.tiktoken").open("a") as file:
        file.write("aGU= 464\naGVs 465\nd28= 466\n")  # he, hel, wo
    return from_tiktoken(folder / "qwen.tiktoken")


def test_a_peer_has_the_same_vocabulary(vocabulary: BytePairTokenizer) -> None:
    peer = peer_of(vocabulary, "tiktoken")
    assert list(peer.encode("hello world")) == vocabulary.encode("hello world")
    with pytest.raises(UsageError, match=r"peer: got 'tictoken'\. Did you mean 'tiktoken'"):
        peer_of(vocabulary, "tictoken")


def test_hugging_faces_package_has_it_too(vocabulary: BytePairTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers comes with the bench and oracle extras")
    write_folder(vocabulary, tmp_path)
    opened = open_encoder(f"tokenizers:{tmp_path / 'tokenizer.json'}")
    for peer in (peer_of(vocabulary, "tokenizers"), opened):
        assert list(peer.encode("hello world")) == vocabulary.encode("hello world")
    with pytest.raises(UsageError, match="tokenizer: 'tokenizers:gone' cannot be opened"):
        open_encoder("tokenizers:gone")


def test_a_package_that_is_missing_is_named(
    vocabulary: BytePairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    monkeypatch.setitem(__import__("sys").modules, "quicktok", None)
    with pytest.raises(MissingDependencyError, match=r"qwenkit\[bench\]"):
        open_encoder("tokenizers:x.json")
    with pytest.raises(
        UsageError, match=r"peer: quicktok cannot be imported.*pip install quicktok-v1"
    ):
        peer_of(vocabulary, "quicktok")


def test_the_commands(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "en.txt").write_text(TEXTS["en"])
    arguments = ["--text", f"en={tmp_path / 'en.txt'}", "--out", str(tmp_path / "out")]
    arguments += ["--tokenizer", str(folder), "--tokenizer", str(folder / "qwen.tiktoken")]
    done = CliRunner().invoke(app, ["bench", "compression", *arguments])
    assert done.exit_code == 0, done.output
    assert "| en | 11 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3
    speed = ["bench", "tokenizer", str(tmp_path / "en.txt"), "--model", str(folder)]
    done = CliRunner().invoke(app, [*speed, "--peer", "tiktoken", "--turns", "1", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(row["name"], row["same_ids"]) for row in told] == [
        ("qwenkit", True),
        ("tiktoken", True),
    ]
