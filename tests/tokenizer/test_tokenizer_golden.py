"""Ids that the original tokenizers gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import BytePairTokenizer, from_folder
from qwenkit.tokenizer.bpe import BYTE_ALPHABET, compose


def _lines(golden_dir: Path) -> list[dict[str, Any]]:
    path = golden_dir / "tokenizer" / "qwen1_original_vectors.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_first_generation_encodes_as_the_original(
    qwen1: BytePairTokenizer, golden_dir: Path
) -> None:
    cases = [case for case in _lines(golden_dir) if "text" in case]
    assert len(cases) > 30
    for case in cases:
        text = case["text"]
        assert qwen1.encode(text, allowed_special="all") == case["ids"], text
        assert qwen1.encode(text) == case["ids_no_special"], text
        assert qwen1.encode(text, allowed_special=set()) == case["ids_no_special"], text
        if "ids_strict_error" in case:
            with pytest.raises(ValueError, match="disallowed special token"):
                qwen1.encode(text, disallowed_special="all")
        else:
            assert qwen1.encode(text, disallowed_special="all") == case["ids_strict"], text


def test_first_generation_decodes_as_the_original(
    qwen1: BytePairTokenizer, golden_dir: Path
) -> None:
    cases = [case for case in _lines(golden_dir) if "decoded" in case]
    assert len(cases) > 40
    for case in cases:
        ids = case["ids"] if "ids" in case else case["decode_ids"]
        assert qwen1.decode(ids) == case["decoded"]
        assert qwen1.decode(ids, skip_special=True) == case["decoded_skip_special"]
        if "decoded_ignore" in case:
            assert qwen1.decode(ids, errors="ignore") == case["decoded_ignore"]
        if "tokens_hex" in case:
            tokens = [qwen1.token(i) for i in ids]
            spelt = [f"S:{t}" if isinstance(t, str) else t.hex() for t in tokens]
            assert spelt == case["tokens_hex"]


def test_first_generation_control_tokens(qwen1: BytePairTokenizer, golden_dir: Path) -> None:
    info = next(case["info"] for case in _lines(golden_dir) if "info" in case)
    assert len(qwen1) == qwen1.vocab_size == info["vocab_size"] == 151851
    assert len(qwen1.control_tokens) == 208
    for text, token_id in info["special"].items():
        assert qwen1.control_tokens[text] == token_id
    assert qwen1.special_ids == frozenset(range(151643, 151851))


def test_llama_cpp_vectors(qwen2: BytePairTokenizer, golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "tokenizer" / "llamacpp_qwen2.json").read_text("utf-8"))
    for case in cases:
        assert qwen2.encode(case["text"]) == case["ids"], case["text"]
        assert qwen2.decode(case["ids"]) == case["text"]


def test_transformers_vectors(qwen2: BytePairTokenizer, golden_dir: Path) -> None:
    path = golden_dir / "tokenizer" / "transformers_qwen2_integration.json"
    golden = json.loads(path.read_text("utf-8"))
    for case in golden["cases"]:
        assert qwen2.encode(case["text"]) == case["ids"]
    assert compose(golden["nfc"]["input"]) == golden["nfc"]["output"]


def test_transformers_toy_vocabulary(golden_dir: Path, tmp_path: Path) -> None:
    path = golden_dir / "tokenizer" / "transformers_qwen2_integration.json"
    toy = json.loads(path.read_text("utf-8"))["toy"]
    tokens = [*BYTE_ALPHABET_IN_GPT2_ORDER, *toy["extra_tokens"]]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(toy["merges"]) + "\n")
    decoder = {str(i): {"content": t, "special": True} for t, i in toy["special"].items()}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = from_folder(tmp_path)
    for case in toy["cases"]:
        assert tokenizer.encode(case["text"], allowed_special="all") == case["ids"]
        assert tokenizer.decode(case["ids"]) == case.get("decoded", case["text"])
    assert tokenizer.backend == "tiktoken"


# The order in which GPT-2 lists its alphabet: printable bytes first.
BYTE_ALPHABET_IN_GPT2_ORDER = [c for c in BYTE_ALPHABET if ord(c) < 256] + [
    c for c in BYTE_ALPHABET if ord(c) >= 256
]


def test_token_counts_of_the_udhr(
    qwen1: BytePairTokenizer, golden_dir: Path, shared_dir: Path
) -> None:
    counts = json.loads((golden_dir / "tokenizer" / "udhr_qwen_token_counts.json").read_text())
    lines = (shared_dir / "data" / "udhr.jsonl").read_text("utf-8").splitlines()
    texts = {row["lang"]: row["text"] for row in map(json.loads, lines)}
    for language, expected in counts.items():
        assert len(texts[language]) == expected["chars"]
        assert len(qwen1.encode(texts[language])) == expected["tokens"], language


def test_published_examples_of_injection_prevention(qwen1: BytePairTokenizer) -> None:
    text = 'print("<|endoftext|>")'
    plain = [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert qwen1.encode(text, allowed_special="all") == [1350, 445, 151643, 899]
    assert qwen1.encode(text, allowed_special=set()) == plain
    with pytest.raises(TokenizerError) as raised:
        qwen1.encode(text, allowed_special=set(), disallowed_special="all")
    assert str(raised.value).startswith(
        "Encountered text corresponding to disallowed special token '<|endoftext|>'.\n"
    )
    mixed = 'print("<|extra_0|>")<|endoftext|>'
    ids = qwen1.encode(mixed, allowed_special={"<|endoftext|>"}, disallowed_special=())
    assert ids == [1350, 9639, 91, 15460, 62, 15, 91, 82598, 151643]
    with pytest.raises(
        ValueError, match=r"disallowed special token '<\|extra_0\|>'\.\nIf you want"
    ):
        qwen1.encode(mixed, allowed_special={"<|endoftext|>"}, disallowed_special=("<|extra_0|>",))


def test_same_text_in_other_contexts(qwen1: BytePairTokenizer) -> None:
    def tokens(text: str) -> list[bytes | str]:
        return [qwen1.token(i) for i in qwen1.encode(text)]

    assert tokens("Panda") == [b"P", b"anda"]
    assert tokens(" Panda") == [b" Panda"]
    assert tokens("Pandas") == [b"P", b"andas"]
    assert tokens(" Pandas") == [b" Pand", b"as"]
    assert qwen1.encode(":\n") == [510]


def test_digits_stand_alone(qwen1: BytePairTokenizer) -> None:
    assert qwen1.encode("2024") == [17, 15, 17, 19]


def test_bytes_that_are_no_character_yet(qwen1: BytePairTokenizer) -> None:
    assert qwen1.decode([51461]) == " \ufffd"
    assert qwen1.decode([51461, 117]) == " 根"
    stream = qwen1.stream()
    assert [stream.push(51461), stream.push(117), stream.finish()] == [" ", "根", ""]
