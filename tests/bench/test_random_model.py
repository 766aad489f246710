"""Random models of published shapes are real files that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.bench.shapes import SHAPES, shape
from qwenkit.errors import UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
}


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen2-7b", "smollm2-135m"])
@pytest.mark.parametrize("storage", ["Q4_0", "Q8_0", "BF16", "Q4_K"])
def test_a_small_cut_of_each_shape_loads_and_computes(
    name: str, storage: str, tmp_path: Path
) -> None:
    path = tmp_path / "random.gguf"
    write_random_gguf(path, shape(name) | TINY, storage=storage)
    loaded = load(path, dtype="float32")
    assert loaded.record.vocab_rows == 300
    ids = torch.tensor(loaded.tokenizer.encode("hello"))
    logits = loaded.model(ids, PackedCausal([len(ids)]))
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    config = shape("qwen2-0.5b") | TINY
    for name in ("a", "b"):
        write_random_gguf(tmp_path / name, config, seed=7)
    write_random_gguf(tmp_path / "c", config, seed=8)
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != other


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"qwen2-0\.5b"):
        shape("qwen2-0.5")
    with pytest.raises(UsageError, match="Q4_0"):
        write_random_gguf(tmp_path / "x", SHAPES["qwen2-0.5b"], storage="Q4")


@pytest.mark.parametrize("rows", [300, 2_000, 49_152, 151_936])
def test_every_row_of_the_vocabulary_is_a_token(rows: int, tmp_path: Path) -> None:
    small = TINY | {"vocab_size": rows, "hidden_size": 32, "num_attention_heads": 1}
    small |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 32}
    write_random_gguf(tmp_path / "random.gguf", shape("qwen2-0.5b") | small)
    tokenizer = load(tmp_path / "random.gguf").tokenizer
    assert tokenizer.vocab_size == rows
    assert tokenizer.control_tokens == {"<|endoftext|>": rows - 1}
    assert tokenizer.decode(tokenizer.encode("any text, 任何文字")) == "any text, 任何文字"
