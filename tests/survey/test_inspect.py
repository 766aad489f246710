"""What a checkpoint is: parameters from shapes alone, bytes from headers alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import Checkpoint, open_checkpoint, write_safetensors
from qwenkit.models.spec import find
from qwenkit.survey.info import ModelInfo, count_parameters, inspect, kv_bytes_per_token

# Name: hidden, layers, heads, key-value heads, intermediate, rows, tied; parameters, those without
# embedding and head. Shapes of the published config.json files; the counts were computed with pen
# and paper from them (see `by_hand`) and are the published ones, rounded less.
PUBLISHED: dict[str, tuple[tuple[int, int, int, int, int, int, bool], int, int]] = {
    "Qwen1.5-0.5B": ((1024, 24, 16, 16, 2816, 151936, True), 463_987_712, 308_405_248),
    "Qwen1.5-1.8B": ((2048, 24, 16, 16, 5504, 151936, False), 1_836_828_672, 1_214_498_816),
    "Qwen1.5-4B": ((2560, 40, 20, 20, 6912, 151936, False), 3_950_369_280, 3_172_456_960),
    "Qwen1.5-7B": ((4096, 32, 32, 32, 11008, 151936, False), 7_721_324_544, 6_476_664_832),
    "Qwen1.5-14B": ((5120, 40, 40, 40, 13696, 152064, False), 14_167_290_880, 12_610_155_520),
    "Qwen1.5-32B": ((5120, 64, 40, 8, 27392, 152064, False), 32_512_218_112, 30_955_082_752),
    "Qwen1.5-72B": ((8192, 80, 64, 64, 24576, 152064, False), 72_287_920_128, 69_796_503_552),
    "Qwen1.5-110B": ((8192, 80, 64, 8, 49152, 152064, False), 111_209_914_368, 108_718_497_792),
    "Qwen2-0.5B": ((896, 24, 14, 2, 4864, 151936, True), 494_032_768, 357_898_112),
    "Qwen2-1.5B": ((1536, 28, 12, 2, 8960, 151936, True), 1_543_714_304, 1_310_340_608),
    "Qwen2-7B": ((3584, 28, 28, 4, 18944, 152064, False), 7_615_616_512, 6_525_621_760),
    "Qwen2-72B": ((8192, 80, 64, 8, 29568, 152064, False), 72_706_203_648, 70_214_787_072),
}


def config_of(shape: tuple[int, int, int, int, int, int, bool]) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, intermediate, rows, tied = shape
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


def by_hand(shape: tuple[int, int, int, int, int, int, bool]) -> int:
    hidden, layers, heads, kv_heads, intermediate, rows, tied = shape
    kv_size = hidden // heads * kv_heads
    attention = 2 * hidden * hidden + 2 * hidden * kv_size + hidden + 2 * kv_size
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return layers * layer + hidden + rows * hidden * (1 if tied else 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_shapes(name: str) -> None:
    shape, total, without_embeddings = PUBLISHED[name]
    architecture = find("qwen2")
    counted = count_parameters(architecture, architecture.config(config_of(shape)))
    assert counted.total() == total == by_hand(shape)
    assert counted.total() - counted["embedding"] - counted["head"] == without_embeddings
    assert (counted["head"] == 0) == shape[-1]
    assert counted["other"] == 0


def test_keys_and_values_of_a_token() -> None:
    architecture = find("qwen2")

    def kib(name: str) -> float:
        return kv_bytes_per_token(architecture.config(config_of(PUBLISHED[name][0]))) / 1024

    assert kib("Qwen1.5-7B") == 512  # every head has its own, as in the first generation
    assert kib("Qwen2-7B") == 56
    assert kib("Qwen2-0.5B") == 12


@pytest.fixture(scope="module")
def default_info(default_model_path: Path) -> ModelInfo:
    return inspect(default_model_path)


def test_the_embedded_model(default_info: ModelInfo) -> None:
    assert default_info.architecture == "llama"
    assert default_info.container == "gguf"
    assert default_info.parameters == 134_515_008
    assert default_info.non_embedding_parameters == 134_515_008 - 49_152 * 576
    assert default_info.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert default_info.padded_rows == 0
    assert default_info.stops == ((2, "<|im_end|>"), (0, "<|endoftext|>"))
    assert default_info.template is not None
    assert default_info.template.startswith("{% for message in messages %}")
    assert default_info.record.licence == "apache-2.0"
    assert default_info.record.quantization == "Q4_1"
    assert default_info.record.context_tokens == 8192
    assert default_info.record.sampling.temperature == 0.2


def test_bytes_by_part_are_all_the_bytes(default_info: ModelInfo) -> None:
    parts = {p.name: p for p in default_info.parts}
    assert list(parts) == ["embedding", "attention", "mlp", "norms"]
    assert sum(p.stored_bytes for p in parts.values()) == default_info.stored_bytes
    assert sum(default_info.storages.values()) == default_info.stored_bytes
    assert parts["embedding"].stored_bytes == 49_152 * 576 // 32 * 34  # Q8_0: 32 numbers, 34 bytes
    assert parts["mlp"].stored_bytes == parts["mlp"].parameters // 32 * 20  # Q4_1
    assert parts["norms"].stored_bytes == parts["norms"].parameters * 4


def test_no_weight_is_read(default_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> torch.Tensor:
        raise AssertionError("a weight was read")

    def unreadable(path: Path) -> Checkpoint:
        opened = open_checkpoint(path)
        tensors = {n: dataclasses.replace(t, read=refuse) for n, t in opened.tensors.items()}
        return dataclasses.replace(opened, tensors=tensors)

    monkeypatch.setattr("qwenkit.survey.info.open_checkpoint", unreadable)
    assert inspect(default_model_path).parameters == 134_515_008


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small untied Qwen2 model with a vocabulary of 256 bytes and padded rows."""
    shape = (32, 2, 4, 2, 48, 320, False)
    config = config_of(shape)
    architecture = find("qwen2")
    with torch.device("meta"):
        model = architecture.build(architecture.config(config))
    tensors = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    characters = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)])]
    characters += [chr(256 + i) for i in range(256 - len(characters))]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(characters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "chat_template": "\n{{ messages }}\nsecond line",
                "added_tokens_decoder": {
                    "256": {"content": "<|endoftext|>", "special": True},
                    "257": {"content": "<|im_end|>", "special": True},
                },
            }
        )
    )
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return tmp_path


def test_a_folder(folder: Path) -> None:
    info = inspect(folder)
    assert info.container == "safetensors"
    assert info.parameters == by_hand((32, 2, 4, 2, 48, 320, False))
    assert info.stored_bytes == 2 * info.parameters
    assert info.storages == {"BF16": 2 * info.parameters}
    assert {p.name for p in info.parts} == {"embedding", "attention", "mlp", "norms", "head"}
    assert all(p.stored_bytes == 2 * p.parameters for p in info.parts)
    assert info.padded_rows == 320 - 258
    assert info.template == "{{ messages }}"
    assert {i for i, _ in info.stops} == {256, 257}
    assert info.record.licence == "apache-2.0"
    assert info.record.quantization is None
    assert info.shapes["intermediate_size"] == 48


def test_the_info_is_plain_data(folder: Path) -> None:
    values = dataclasses.asdict(inspect(folder))
    values["path"] = str(values["path"])
    assert json.loads(json.dumps(values))["parameters"] == values["parameters"]
