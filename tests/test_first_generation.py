"""A checkpoint of the first generation: loads without remote code, chats and stops as published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from first_generation import ENDOFTEXT, FIRST, IM_END, first_tensors
from first_generation import write_first_generation as write
from qwenkit.api import LLM
from qwenkit.errors import CheckpointError, QwenkitError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load

MESSAGES = [{"role": "user", "content": "Hello<|im_end|>"}]
AUGUST = {
    "n_embd": 32,
    "ffn_hidden_size": 96,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "padded_vocab_size": 480,
    "vocab_size": 464,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": None,
}


def _logits(folder: Path, tokens: int = 40) -> torch.Tensor:
    loaded = load(folder)
    logits: torch.Tensor = loaded.model(torch.arange(tokens), PackedCausal([tokens]))
    return logits


def test_both_config_layouts_compute_the_same(tmp_path: Path) -> None:
    new, old = write(tmp_path / "new"), write(tmp_path / "old", config=AUGUST)
    assert torch.equal(_logits(new, 100), _logits(old, 100))


def test_it_loads_from_qwen2_s_key_layout_too(tmp_path: Path) -> None:
    published = first_tensors(FIRST)
    renamed = {}
    for name, tensor in published.items():
        parts = name.replace("transformer.h.", "model.layers.").replace("attn.c_proj", "o_proj")
        parts = parts.replace("mlp.c_proj", "mlp.down_proj").replace("o_proj", "self_attn.o_proj")
        parts = parts.replace("mlp.w2", "mlp.gate_proj").replace("mlp.w1", "mlp.up_proj")
        parts = parts.replace("ln_1", "input_layernorm").replace("ln_2", "post_attention_layernorm")
        parts = parts.replace("transformer.wte", "model.embed_tokens")
        parts = parts.replace("transformer.ln_f", "model.norm")
        if "c_attn" in parts:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                own = parts.replace("attn.c_attn", f"self_attn.{letter}_proj")
                renamed[own] = piece.contiguous()
        else:
            renamed[parts] = tensor
    folder = write(tmp_path / "v2", tensors=renamed)
    assert torch.equal(_logits(folder), _logits(write(tmp_path / "v1")))
    del renamed["model.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.bias: is missing"):
        load(write(tmp_path / "short", tensors=renamed))


def test_the_gate_is_w2(tmp_path: Path) -> None:
    model = load(write(tmp_path)).model
    mlp = model.get_submodule("transformer.h.0.mlp")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    w1, w2, out = (mlp.get_parameter(f"{name}.weight") for name in ("w1", "w2", "c_proj"))
    expected = (torch.nn.functional.silu(x @ w2.T) * (x @ w1.T)) @ out.T
    torch.testing.assert_close(mlp(x), expected)


def test_old_buffers_are_no_part_of_the_model(tmp_path: Path) -> None:
    tensors = first_tensors(FIRST)
    tensors |= {"transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors |= {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    load(write(tmp_path, tensors=tensors))


def test_it_chats_in_the_built_in_chatml(tmp_path: Path) -> None:
    with LLM(write(tmp_path)) as llm:
        assert llm.record.chat_format == "chatml"
        assert llm.record.history_window_tokens == 200
        assert llm.record.trained_context_tokens == 64
        assert set(llm.record.stop_token_ids) == {ENDOFTEXT, IM_END}
        rendered = llm.render(MESSAGES)
        assert rendered.text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        )
        assert rendered.ids.count(IM_END) == 2  # the user's own is plain text
        answer = llm.chat(MESSAGES, {"temperature": 0, "max_tokens": 8})
        assert answer.usage.prompt_tokens == len(rendered.ids)
        assert answer.usage.extension.method == "qwen-ntk"  # 64 tokens are the trained length


@pytest.mark.parametrize("end", [ENDOFTEXT, IM_END])
def test_it_stops_as_published(tmp_path: Path, end: int) -> None:
    tensors = first_tensors(FIRST)
    tensors["transformer.wte.weight"] += 100  # hidden states of one sign
    tensors["transformer.ln_f.weight"].fill_(1)
    tensors["lm_head.weight"].zero_()
    tensors["lm_head.weight"][end] = 1  # every other token is below it
    with LLM(write(tmp_path, tensors=tensors)) as llm:
        answer = llm.chat(MESSAGES, {"temperature": 0, "max_tokens": 8})
        assert (answer.finish_reason, answer.matched_stop) == ("stop", end)


def test_a_base_model_refuses_to_chat_and_completes(tmp_path: Path) -> None:
    base = {"eos_token_id": ENDOFTEXT, "max_new_tokens": 4, "chat_format": "raw"}
    with LLM(write(tmp_path, generation=base)) as llm:
        assert llm.record.chat_format == "raw"
        with pytest.raises(QwenkitError, match="Qwen-7B-Chat"):
            llm.chat(MESSAGES)
        answer = llm.generate("Hello", {"temperature": 0, "max_tokens": 4})
        assert not isinstance(answer, list)
        assert dataclasses.asdict(answer)["text"] is not None
