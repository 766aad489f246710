"""`make_context`, `decode_tokens` and the stop words against the original's own answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.compat import (
    AutoTokenizer,
    CompatTokenizer,
    decode_tokens,
    get_stop_words_ids,
    make_context,
)
from qwenkit.tokenizer import from_tiktoken
from tiny import write_tiny_checkpoint

VECTORS = Path(__file__).parents[1] / "golden" / "tokenizer" / "qwen1_original_vectors.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in VECTORS.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CompatTokenizer:
    spec = importlib.util.find_spec("dashscope")  # it carries the original vocabulary
    assert spec is not None
    assert spec.origin is not None
    core = from_tiktoken(Path(spec.origin).parent / "resources" / "qwen.tiktoken")
    tiny = AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))
    record = dataclasses.replace(tiny.record, vocab_size=core.vocab_size, vocab_rows=151936)
    return CompatTokenizer(core, record, pad_token="<|extra_0|>", eos_token="<|endoftext|>")


@pytest.mark.parametrize("row", [r for r in ROWS if "make_context" in r])
def test_the_prompt_is_the_originals(tokenizer: CompatTokenizer, row: dict[str, Any]) -> None:
    given = dict(row["make_context"])
    given["history"] = [tuple(turn) for turn in given.get("history", [])]
    text, ids = make_context(tokenizer, **given)
    assert text == row["raw_text"]
    assert ids == row["ids"]


@pytest.mark.parametrize("row", [r for r in ROWS if "decode_tokens" in r])
def test_the_reply_is_the_originals(tokenizer: CompatTokenizer, row: dict[str, Any]) -> None:
    given = row["decode_tokens"]
    text = decode_tokens(
        given["ids"], tokenizer, given["raw_text_len"], given["context_length"], "chatml"
    )
    lost = ""  # the original lost the last token of a reply without an end; that is mended
    if given["label"] in ("length", "eod"):
        lost = tokenizer.decode(given["ids"][-1])
        assert lost
    assert text == row["result"] + lost


def test_the_stop_words_are_the_originals(tokenizer: CompatTokenizer) -> None:
    expected = next(r["stop_words"] for r in ROWS if "stop_words" in r)
    assert {f: get_stop_words_ids(f, tokenizer) for f in expected} == expected


def test_sizes_and_ids_are_the_originals(tokenizer: CompatTokenizer) -> None:
    info = next(r["info"] for r in ROWS if "info" in r)
    assert (len(tokenizer), tokenizer.vocab_size) == (info["len"], info["vocab_size"])
    assert tokenizer.eod_id == info["eod"]
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (info["im_start"], info["im_end"])
    assert tokenizer.convert_tokens_to_ids(list(info["special"])) == list(info["special"].values())
