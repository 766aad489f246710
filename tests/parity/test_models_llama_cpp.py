"""GGUF files of random small models, written under our names, computed by llama.cpp: the tensors
and keys mean there what they mean here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import read_model

from qwenkit.checkpoint import write_gguf
from qwenkit.checkpoint.storages import TAGS
from qwenkit.layers.attention import PackedCausal
from qwenkit.models.published import gguf_tensors
from qwenkit.models.spec import find

pytestmark = pytest.mark.oracle

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 80},
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    # llama.cpp tells the models of Baichuan by their layers: 40 are the one with ALiBi
    "baichuan": {key: SIZES[key] for key in SIZES if key != "max_position_embeddings"}
    | {"num_hidden_layers": 40, "model_max_length": 512, "num_key_value_heads": 4}
    | {"z_loss_weight": 0},
}
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def _tokens() -> list[str]:
    """The byte alphabet of GPT-2, and names for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = len(set(range(256)) - set(printable))
    bytes_ = [chr(b) for b in printable] + [chr(256 + n) for n in range(unprintable)]
    return bytes_ + [f"<|{n}|>" for n in range(VOCABULARY - len(bytes_))]


def _write(file: Path, model_type: str) -> None:
    architecture, config = find(model_type), CONFIGS[model_type]
    arch = architecture.gguf_arch
    keys = KEYS | ({"context_length": "model_max_length"} if "model_max_length" in config else {})
    metadata = {f"{arch}.{key}": config[ours] for key, ours in keys.items() if ours in config} | {
        "general.architecture": arch,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": _tokens(),
        "tokenizer.ggml.token_type": ("i32", [1] * VOCABULARY),
        "tokenizer.ggml.merges": ("str", ["! !"]),
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
    }
    model = architecture.build(architecture.config(config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        parameter.normal_(1 if "norm" in name else 0, 0.15, generator=generator)
    tensors = gguf_tensors(model, architecture)
    write_gguf(file, metadata, [(t.name, t.shape, TAGS[t.tensor.dtype], t.tensor) for t in tensors])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_llama_cpp_computes_the_same_logits(model_type: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python (make oracles)")
    import llama_cpp

    file = tmp_path / "tiny.gguf"
    _write(file, model_type)
    ids = torch.randint(0, VOCABULARY, (29,), generator=torch.Generator().manual_seed(1))

    theirs = llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    theirs.eval(ids.tolist())
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))  # [29, vocab_size]
    theirs.close()

    ours = read_model(file)
    got = ours(ids, PackedCausal([len(ids)]))  # [29, vocab_size]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
