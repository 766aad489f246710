"""GGUF files of ours are read equal by gguf-py, and files of gguf-py's are read equal by us."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenkit.checkpoint import open_checkpoint, write_gguf
from qwenkit.checkpoint.gguf import read_gguf
from qwenkit.checkpoint.storages import (
    BLOCKS,
    GGML_NUMBERS,
    GGML_UNREAD,
    PLAIN,
    read_shape,
    size_bytes,
)
from qwenkit.models.spec import architectures

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.oracle

METADATA: dict[str, Any] = {
    "general.architecture": "qwen2",
    "x.whole": 7,
    "x.large": 2**40,
    "x.negative": -5,
    "x.fraction": 0.1,
    "x.flag": True,
    "x.text": "通义千问 \u0000 e\u0301",
    "x.texts": ["a", "", "日本"],
    "x.wholes": [1, -2, 3],
    "x.fractions": [0.5, -1.5],
    "x.flags": [True, False],
}
SHARED = [t for t in GGML_NUMBERS if t != "Q8_1"]  # gguf-py has its size from before ggml's change
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # what gguf-py can make itself


def test_the_table_of_types_is_ggmls() -> None:
    theirs = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    for tag in SHARED:
        block = BLOCKS.get(tag)
        ours = (block.elements, block.size_bytes) if block else (1, PLAIN[tag].itemsize)
        assert theirs[tag] == (GGML_NUMBERS[tag], *ours)
    assert {n: t for t, (n, _, _) in theirs.items() if t not in GGML_NUMBERS} == GGML_UNREAD


def random_tensors() -> list[tuple[str, tuple[int, ...], str, bytes]]:
    """One tensor of every type, of every number of dimensions."""
    noise = random.Random(0)
    rows = []
    for number, storage in enumerate(SHARED):
        columns = BLOCKS[storage].elements * 2 if storage in BLOCKS else 5
        shape = (*(3, 2, 2)[: number % 4], columns)
        size = size_bytes(storage, shape)
        rows.append((f"blk.{number}.层", shape, storage, noise.randbytes(size)))
    return rows


@pytest.mark.parametrize("alignment", [32, 256])
def test_gguf_py_reads_what_we_write(alignment: int, tmp_path: Path) -> None:
    rows = random_tensors()
    file = tmp_path / "m.gguf"
    write_gguf(file, METADATA, rows, alignment=alignment)
    reader = gguf.GGUFReader(file)
    assert reader.alignment == alignment
    for key, value in METADATA.items():
        theirs = reader.fields[key].contents()
        assert theirs == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value)
    assert [t.name for t in reader.tensors] == [name for name, _, _, _ in rows]
    for tensor, (_, shape, storage, raw) in zip(reader.tensors, rows, strict=True):
        assert tensor.tensor_type.name == storage
        assert tuple(int(d) for d in reversed(tensor.shape)) == shape
        assert tensor.data.tobytes() == raw


def write_with_gguf_py(file: Path, arrays: dict[str, Any], kinds: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(file, "qwen2")
    for key, value in METADATA.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_int64(key, value)
    for name, data in arrays.items():
        writer.add_tensor(name, data, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", architectures())
def test_every_tensor_has_the_name_that_gguf_py_gives_it(model_type: str) -> None:
    architecture = architectures()[model_type]
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.gguf_arch]
    held = set(gguf.MODEL_TENSORS[arch])
    if "moe" in model_type:  # in layers without experts, which gguf-py does not think of
        held |= set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN2])
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{}") for tensor in held}
    for name in architecture.gguf_names:
        for part in architecture.gguf_parts.get(name, (name,)):
            assert part.rpartition(".")[0] in known, f"{part} in {architecture.gguf_arch}"


def test_we_read_what_gguf_py_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = {
        "F32": np.float32,
        "F16": np.float16,
        "F64": np.float64,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
    }
    arrays: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for tag, dtype in plain.items():
        arrays[tag] = (rng.standard_normal((2, 3, 5)) * 50).astype(dtype)
    for tag in [*QUANTIZED, "BF16"]:
        kinds[tag] = gguf.GGMLQuantizationType[tag]
        arrays[tag] = gguf.quantize(rng.standard_normal((4, 64)).astype(np.float32), kinds[tag])
    file = tmp_path / "m.gguf"
    write_with_gguf_py(file, arrays, kinds)
    read = read_gguf(file)
    assert {k: read.metadata[k] for k in METADATA} == METADATA
    assert list(read.tensors) == list(arrays)
    for tag, data in arrays.items():
        stored = read.tensors[tag]
        assert stored.storage == tag
        assert stored.shape == ((4, 64) if tag in kinds else (2, 3, 5))
        view = stored.read()
        assert view.shape == read_shape(tag, stored.shape)
        assert view.reshape(-1).view(torch.uint8).numpy().tobytes() == data.tobytes()


def test_numbers_mean_the_same(tmp_path: Path) -> None:
    """Not only the bytes: plain tensors go through both as numbers."""
    file = tmp_path / "m.gguf"
    numbers = torch.arange(12.0).reshape(3, 4) / 8
    rows = [(t, (3, 4), t, numbers.to(PLAIN[t])) for t in ("F32", "F16", "F64", "I32")]
    write_gguf(file, {"general.architecture": "qwen2"}, rows)
    ours = read_gguf(file).tensors
    for tensor in gguf.GGUFReader(file).tensors:
        assert torch.equal(torch.from_numpy(np.array(tensor.data)), ours[tensor.name].read())


def test_a_model_of_gguf_pys_keys_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "qwen2moe")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(1024)
    writer.add_expert_count(6)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(16)
    writer.add_expert_shared_feed_forward_length(24)
    writer.add_expert_weights_norm(True)
    writer.add_sliding_window(512)
    writer.add_license("other")
    writer.add_license_name("tongyi-qianwen")
    writer.add_token_list(["a", "b", "c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(file)
    assert checkpoint.config == {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
        "sliding_window": 512,
        "use_sliding_window": True,
        "vocab_size": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    assert checkpoint.generation_config["eos_token_id"] == [1, 2]
    assert checkpoint.tokenizer_config["add_bos_token"] is False
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.licence == "tongyi-qianwen"
