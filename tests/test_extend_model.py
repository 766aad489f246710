"""A model with a larger vocabulary: its rows, its files, that it loads, chats and is otherwise the
same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from first_generation import write_first_generation
from qwenkit.api import LLM
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.compat import AutoTokenizer
from qwenkit.convert import extend_folder
from qwenkit.errors import TokenizerError, UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.models.published import published_tensors
from qwenkit.save import save_folder
from qwenkit.tokenizer import from_folder, write_folder
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

# Of a vocabulary of 256 bytes and 208 control tokens, in 480 rows.
FEW = {b"ab": 464, b"abc": 465, "猫".encode()[:2]: 466, "猫".encode(): 467}
MANY = {bytes([b, 98]): 464 + i for i, b in enumerate(range(97, 122))}


def _rows(folder: Path) -> Mapping[str, torch.Tensor]:
    return {named.name: named.tensor for named in published_tensors(load(folder).model)}


@pytest.mark.parametrize("tied", [False, True])
def test_padding_rows_are_used_first(tmp_path: Path, tied: bool) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "old", config={"tie_word_embeddings": tied}, tensors=_tied(tied)
    )
    done = extend_folder(source, tmp_path / "new", FEW)
    assert (done.rows_before, done.rows) == (480, 480)
    old, new = _rows(source), _rows(tmp_path / "new")
    assert list(old) == list(new)
    grown = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for name in old:
        if name not in grown:
            assert torch.equal(old[name], new[name]), name
    for name in grown:
        expected = old[name].clone()
        for token, token_id in FEW.items():
            expected[token_id] = old[name][list(token)].mean(0)
        assert torch.equal(new[name], expected)


def _tied(tied: bool) -> dict[str, torch.Tensor] | None:
    if not tied:
        return None
    return tiny_tensors(CONFIG | {"tie_word_embeddings": True})


def test_then_rows_are_added(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old", config={"torch_dtype": "bfloat16"})
    done = extend_folder(source, tmp_path / "new", MANY)
    assert (done.rows_before, done.rows) == (480, 512)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 512
    old, new = _rows(source), _rows(tmp_path / "new")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (512, 32)
        assert torch.equal(new[name][:464], old[name][:464])
        torch.testing.assert_close(new[name][489:], old[name].mean(0).expand(23, -1))


def test_text_without_new_tokens_is_computed_as_before(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old")
    extend_folder(source, tmp_path / "new", MANY)
    ids = torch.tensor(list(b"xyz, hello"))
    with torch.inference_mode():
        old, new = (
            load(folder).model(ids, PackedCausal([len(ids)]))
            for folder in (source, tmp_path / "new")
        )
    torch.testing.assert_close(new[:, :464], old[:, :464])


def test_it_chats_with_the_new_tokens(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old")
    extend_folder(source, tmp_path / "new", MANY)
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert config["extra_vocab_file"] == "qwen_extra.tiktoken"
    assert "chat_template" in config
    with LLM(str(tmp_path / "new")) as llm:
        assert llm.tokenizer.encode("abxb") == [464, 464 + 23]
        reply = llm.chat([{"role": "user", "content": "abxb"}], {"max_tokens": 5})
        assert reply.usage.completion_tokens > 0
    # Once more, on top, and saved as it is.
    more = extend_folder(tmp_path / "new", tmp_path / "newer", {b"abxb": 489})
    assert (more.rows_before, more.rows) == (512, 512)
    assert from_folder(tmp_path / "newer").encode("abxb ab") == [489, 32, 464]
    save_folder(load(tmp_path / "newer"), tmp_path / "copy")
    assert from_folder(tmp_path / "copy").encode("abxb ab") == [489, 32, 464]


def test_the_first_generation_keeps_its_files(tmp_path: Path) -> None:
    source = write_first_generation(tmp_path / "old")
    vocabulary = from_folder(source)
    first_id = vocabulary.vocab_size
    done = extend_folder(source, tmp_path / "new", {b"zq": first_id})
    assert not (tmp_path / "new" / "tokenizer.json").exists()
    assert from_folder(tmp_path / "new").encode("zq") == [first_id]
    assert load(tmp_path / "new").config.vocab_size == done.rows


def test_todays_files_are_written_anew(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old")
    write_folder(from_folder(source), source)
    (source / "qwen.tiktoken").unlink()
    extend_folder(source, tmp_path / "new", FEW)
    written = from_folder(tmp_path / "new")
    assert written.vocabulary.merges is not None
    assert written.encode("abc猫") == [465, 467]
    assert (tmp_path / "new" / "merges.txt").read_text().count("\n") == 5
    assert open_checkpoint(tmp_path / "new").chat_template


def test_a_gguf_becomes_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "random.gguf"
    write_random_gguf(source, CONFIG | {"vocab_size": 264, "intermediate_size": 64}, storage="Q8_0")
    old = load(source)
    first_id = old.tokenizer.vocab_size
    done = extend_folder(source, tmp_path / "new", {b"ab": first_id})
    new = load(tmp_path / "new")
    assert done.rows == new.config.vocab_size
    assert new.tokenizer.encode("xab") == [*old.tokenizer.encode("x"), first_id]
    embedding = old.model.get_submodule("model.embed_tokens").weight.dequantize(torch.float32)
    mean = embedding[old.tokenizer.encode("a") + old.tokenizer.encode("b")].mean(0)
    written = _rows(tmp_path / "new")["model.embed_tokens.weight"][first_id]
    torch.testing.assert_close(written, mean, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old")
    with pytest.raises(UsageError, match="is the folder that the model was read from"):
        extend_folder(source, source, FEW)
    with pytest.raises(TokenizerError, match=r"is that of the control token '<\|endoftext\|>'"):
        extend_folder(source, tmp_path / "new", {b"ab": 256})


def test_the_published_calls(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "old")
    extra = tmp_path / "extra.tiktoken"
    extra.write_bytes(b"YWI= 464\n")
    tokenizer = AutoTokenizer.from_pretrained(source, extra_vocab_file=str(extra))
    assert len(tokenizer) == 465
    assert tokenizer("ab").input_ids == [464]
    with pytest.raises(ValueError, match=r"^Adding regular tokens is not supported.*add-merges"):
        tokenizer.add_tokens(["cat"])
    with pytest.raises(ValueError, match=r"^Adding unknown special tokens is not supported"):
        tokenizer.add_tokens(["<|cat|>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"^Adding unknown special tokens is not supported"):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    with pytest.raises(UsageError, match="got 'pad'"):
        tokenizer.add_special_tokens({"pad": "<|extra_0|>"})
    assert tokenizer.add_tokens("<|extra_0|>", special_tokens=True) == 0
    both = {"pad_token": "<|extra_0|>", "additional_special_tokens": ["<|extra_1|>"]}
    assert tokenizer.add_special_tokens(both) == 0
    assert tokenizer.pad_token == "<|extra_0|>"
