"""Random small models of each architecture against transformers: logits and gradients in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import QWEN2_MOE, QWEN3, QWEN3_MOE, TINY, make_pair

from qwenkit.layers.attention import PackedCausal

pytestmark = pytest.mark.oracle

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-no-gqa": {"model_type": "qwen2", "num_key_value_heads": 6},
    "qwen2-one-kv-head": {"model_type": "qwen2", "num_key_value_heads": 1, "rope_theta": 5e6},
    "qwen2-eps": {"model_type": "qwen2", "rms_norm_eps": 1e-3},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 16},
    "qwen3-untied": QWEN3,
    "qwen3-tied": QWEN3 | {"tie_word_embeddings": True},
    "qwen3-bias": QWEN3 | {"attention_bias": True},
    "qwen3-head-dim-not-given": {"model_type": "qwen3"},
    "qwen3-eps": QWEN3 | {"rms_norm_eps": 1e-2, "rope_theta": 1e6},
    "qwen2-moe-untied": QWEN2_MOE,
    "qwen2-moe-tied": QWEN2_MOE | {"tie_word_embeddings": True},
    "qwen2-moe-normalised": QWEN2_MOE | {"norm_topk_prob": True},
    "qwen2-moe-every-second-layer": QWEN2_MOE | {"decoder_sparse_step": 2},
    "qwen2-moe-dense-layers": QWEN2_MOE | {"mlp_only_layers": [0, 2]},
    "qwen2-moe-both": QWEN2_MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    | {"mlp_only_layers": [1]},
    "qwen2-moe-no-bias": QWEN2_MOE | {"qkv_bias": False},
    "qwen2-moe-every-expert": QWEN2_MOE | {"num_experts": 4, "num_experts_per_tok": 4},
    "qwen2-moe-one-expert": QWEN2_MOE | {"num_experts_per_tok": 1},
    "qwen3-moe-normalised": QWEN3_MOE,
    "qwen3-moe-unnormalised": QWEN3_MOE | {"norm_topk_prob": False},
    "qwen3-moe-bias": QWEN3_MOE | {"attention_bias": True},
    "qwen3-moe-every-second-layer": QWEN3_MOE | {"decoder_sparse_step": 2},
    "qwen3-moe-dense-layers-tied": QWEN3_MOE
    | {"mlp_only_layers": [1], "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path)
    ids = torch.randint(0, TINY["vocab_size"], (40,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]  # [40, vocab]
        got = ours(ids, PackedCausal([40]))  # [40, vocab]
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("old_layout", [False, True])
def test_sharded_files_and_old_config_layout(
    old_layout: bool, model_type: str, tmp_path: Path
) -> None:
    variant = {"model_type": model_type, "tie_word_embeddings": False, "rope_theta": 3e5}
    theirs, ours = make_pair(variant, tmp_path, shard="20KB", old_layout=old_layout)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, TINY["vocab_size"], (17,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        got = ours(ids, PackedCausal([17]))
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("old_layout", [False, True])
@pytest.mark.parametrize("stacked", [False, True], ids=["published", "stacked"])
@pytest.mark.parametrize("variant", [QWEN2_MOE, QWEN3_MOE], ids=["qwen2-moe", "qwen3-moe"])
def test_experts_of_both_layouts_in_several_files(
    variant: dict[str, Any], stacked: bool, old_layout: bool, tmp_path: Path
) -> None:
    theirs, ours = make_pair(
        variant, tmp_path, shard="20KB", stacked=stacked, old_layout=old_layout
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, TINY["vocab_size"], (17,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        got = ours(ids, PackedCausal([17]))
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


GRADIENTS = (
    "qwen2-tied",
    "llama-untied",
    "qwen3-untied",
    "qwen2-moe-both",
    "qwen2-moe-normalised",
    "qwen3-moe-dense-layers-tied",
    "qwen3-moe-unnormalised",
)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_on_packed_sequences_agree(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path)
    lengths = [5, 12, 1, 9]
    ids = torch.randint(0, TINY["vocab_size"], (sum(lengths),))
    weights = torch.randn(sum(lengths), TINY["vocab_size"])  # a loss that touches every logit

    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    (ours(ids, PackedCausal(lengths)) * weights).sum().backward()
    theirs.zero_grad()
    pieces = zip(torch.split(ids, lengths), torch.split(weights, lengths), strict=True)
    for piece, part in pieces:
        (theirs(piece[None]).logits[0] * part).sum().backward()

    expected = dict(_gradients(theirs))
    for path, parameter in ours.named_parameters():
        reference = expected.pop(path)
        scale = reference.abs().max().item()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, reference, atol=1e-5 * scale, rtol=0)
    assert not expected


def _gradients(theirs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By our names: transformers keeps all experts in one tensor, gate above up."""
    for name, parameter in theirs.named_parameters():
        if name.endswith("gate_up_proj"):
            gate, up = parameter.grad.chunk(2, dim=1)  # [experts, intermediate, hidden] each
            yield f"{name.replace('gate_up', 'gate')}.weight", gate.flatten(0, 1)
            yield f"{name.replace('gate_up', 'up')}.weight", up.flatten(0, 1)
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", parameter.grad.flatten(0, 1)
        else:
            yield name, parameter.grad
