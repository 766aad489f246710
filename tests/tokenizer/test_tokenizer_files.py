"""Readers: every published format, and every way in which a file can be unusable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import BytePairTokenizer, from_folder, from_gguf, from_tiktoken
from qwenkit.tokenizer.ranks import write_ranks
from tokenizer_toys import MERGES, gguf, split_files, tokenizer_json, toy_vocab, write


def _check_toy(tokenizer: BytePairTokenizer) -> None:
    assert tokenizer.vocab_size == 261
    assert tokenizer.control_tokens == {"<|im_start|>": 259, "<think>": 260}
    assert tokenizer.special_ids == {259}
    assert tokenizer.encode("abc ab") == [258, 257]
    text = "abc<|im_start|>1<think>"
    assert tokenizer.encode(text, allowed_special="all") == [258, 259, ord("1"), 260]
    assert tokenizer.encode(text, allowed_special={"<think>"})[-2:] == [ord("1"), 260]
    assert not {259, 260} & set(tokenizer.encode(text))
    assert tokenizer.encode("A\u030a") == tokenizer.encode("Å")


def test_tokenizer_json(tmp_path: Path) -> None:
    _check_toy(from_folder(write(tmp_path, tokenizer_json())))


def test_tokenizer_json_with_merges_as_pairs(tmp_path: Path) -> None:
    content = tokenizer_json()
    content["model"]["merges"] = [merge.split() for merge in MERGES]
    _check_toy(from_folder(write(tmp_path, content)))


def test_tokenizer_json_that_lists_control_tokens_in_its_vocabulary(tmp_path: Path) -> None:
    content = tokenizer_json()
    content["model"]["vocab"] |= {"<|im_start|>": 259, "<think>": 260}
    _check_toy(from_folder(write(tmp_path, content)))


def test_tokenizer_config_completes_tokenizer_json(tmp_path: Path) -> None:
    content = tokenizer_json()
    added = content["added_tokens"].pop()
    decoder = {"260": {"content": added["content"], "special": False}}
    write(tmp_path, {"added_tokens_decoder": decoder}, "tokenizer_config.json")
    _check_toy(from_folder(write(tmp_path, content)))


@pytest.mark.parametrize(
    "node",
    [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
        },
    ],
)
def test_gpt2_pipeline(tmp_path: Path, node: dict[str, Any]) -> None:
    content = tokenizer_json() | {"normalizer": None, "pre_tokenizer": node}
    tokenizer = from_folder(write(tmp_path, content))
    assert tokenizer.vocabulary.pre_tokenizer.name == "gpt-2"
    assert tokenizer.encode("A\u030a") == [ord("A"), 0xCC, 0x8A]


def test_smollm_pipeline(tmp_path: Path) -> None:
    node = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    }
    content = tokenizer_json() | {"normalizer": None, "pre_tokenizer": node}
    content["model"]["merges"] = ["1 2", "Ġ 1", "Ġ Ġ"]
    content["model"]["vocab"] |= {"12": 261, "Ġ1": 262, "ĠĠ": 263}
    tokenizer = from_folder(write(tmp_path, content))
    assert tokenizer.vocabulary.pre_tokenizer.name == "smollm"
    assert tokenizer.encode("  12") == [263, ord("1"), ord("2")]


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_vocab_and_merges(tmp_path: Path, kind: str) -> None:
    _check_toy(from_folder(split_files(tmp_path, tokenizer_class=kind)))


def test_vocab_and_merges_of_a_model_folder(tmp_path: Path) -> None:
    split_files(tmp_path)
    write(tmp_path, {"model_type": "qwen2"}, "config.json")
    _check_toy(from_folder(tmp_path))


def test_vocab_and_merges_with_windows_line_ends(tmp_path: Path) -> None:
    split_files(tmp_path, tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\na b\r\n\xc4\xa0 ab\r\nab c\r\n")
    _check_toy(from_folder(tmp_path))


def test_added_tokens_json_with_roles(tmp_path: Path) -> None:
    split_files(tmp_path)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_start|>"}
    write(tmp_path, config, "tokenizer_config.json")
    write(tmp_path, {"<|im_start|>": 259, "<think>": 260}, "added_tokens.json")
    _check_toy(from_folder(tmp_path))
    config.pop("eos_token")
    write(tmp_path, config, "tokenizer_config.json")
    roles = {"additional_special_tokens": [{"content": "<|im_start|>"}]}
    write(tmp_path, roles, "special_tokens_map.json")
    _check_toy(from_folder(tmp_path))


def test_vocab_alone_does_not_say_how_text_is_split(tmp_path: Path) -> None:
    split_files(tmp_path, tokenizer_class="LlamaTokenizer")
    with pytest.raises(TokenizerError, match="tokenizer_class 'LlamaTokenizer'"):
        from_folder(tmp_path)
    _check_toy(from_folder(tmp_path, pre_tokenizer="qwen2"))
    with pytest.raises(TokenizerError, match="Did you mean 'qwen2'"):
        from_folder(tmp_path, pre_tokenizer="qwen")


def test_gguf() -> None:
    _check_toy(from_gguf(gguf()))


def test_gguf_with_unused_tokens_between(tmp_path: Path) -> None:
    metadata = gguf()
    metadata["tokenizer.ggml.tokens"][258:258] = ["[PAD258]"]
    metadata["tokenizer.ggml.token_type"][258:258] = [5]
    tokenizer = from_gguf(metadata)
    assert tokenizer.vocabulary.unused_ids == {258}
    assert tokenizer.encode("abc") == [259]
    assert tokenizer.decode([258, 259]) == "abc"


def test_an_ordinary_token_listed_as_added_stays_ordinary() -> None:
    metadata = gguf()
    metadata["tokenizer.ggml.token_type"][258] = 4
    tokenizer = from_gguf(metadata)
    assert tokenizer.encode("abc") == [258]
    assert "abc" not in tokenizer.control_tokens


def test_first_release_names(qwen_tiktoken_path: Path) -> None:
    tokenizer = from_tiktoken(qwen_tiktoken_path, release="first")
    assert tokenizer.vocab_size == 151851
    names = ("<|im_end|>", "<R>", "<S>", "<X>", "<mask>", "<sep>", "<extra_0>", "<extra_199>")
    ids = [tokenizer.control_tokens[name] for name in names]
    assert ids == [151645, 151646, 151647, 151648, 151649, 151650, 151651, 151850]
    with pytest.raises(TokenizerError, match="Did you mean 'first'"):
        from_tiktoken(qwen_tiktoken_path, release="frist")  # type: ignore[arg-type]


@pytest.mark.parametrize("lacking", [{0}, {0x41, 0xFF}])
def test_a_first_generation_without_all_bytes_is_refused(tmp_path: Path, lacking: set[int]) -> None:
    path = tmp_path / "qwen.tiktoken"
    kept = [bytes([value]) for value in range(256) if value not in lacking]
    write_ranks(path, {token: rank for rank, token in enumerate([*kept, b"ab"])})
    message = rf"{len(lacking)} of the 256 tokens of one byte are missing.* 0x{min(lacking):02x};"
    with pytest.raises(TokenizerError, match=message):
        from_tiktoken(path)


def test_folder_of_the_first_generation(qwen_tiktoken_path: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken_path)
    assert from_folder(tmp_path).control_tokens["<|extra_0|>"] == 151646
    decoder = {"151646": {"content": "<|object_ref_start|>", "special": True}}
    write(tmp_path, {"added_tokens_decoder": decoder}, "tokenizer_config.json")
    with pytest.raises(TokenizerError, match="different generations"):
        from_folder(tmp_path)


def test_an_empty_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json, vocab\.json with merges\.txt, qwen"
    ):
        from_folder(tmp_path)
    write(tmp_path, toy_vocab(), "vocab.json")
    write(tmp_path, "", "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"no tokenizer found.* SentencePiece"):
        from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "qwen.tiktoken", "tokenizer_config.json"])
def test_git_lfs_pointers_are_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n"
    with pytest.raises(TokenizerError, match=f"{name}: this is a git-LFS pointer"):
        from_folder(write(tmp_path, pointer, name))
