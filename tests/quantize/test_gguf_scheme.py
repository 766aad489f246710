"""Which tensor gets which type: llama.cpp's rules, as its own quantizer is seen to apply them (the
oracle test compares whole files; here stand the rules that people know).
"""

from __future__ import annotations

import pytest

from qwenkit.checkpoint.storages import GGML_NUMBERS
from qwenkit.errors import UsageError
from qwenkit.quantize.gguf_scheme import SCHEMES, ModelFacts, choose_storages, find_scheme

HIDDEN, FFN, VOCAB = 1024, 2816, 2000
FACTS = ModelFacts("qwen2", layers=24, heads=16, kv_heads=16)


def _tensors(layers: int, *, hidden: int = HIDDEN, tied: bool = False, moe: bool = False):
    found = [("token_embd.weight", (VOCAB, hidden)), ("output_norm.weight", (hidden,))]
    if not tied:
        found.append(("output.weight", (VOCAB, hidden)))
    for layer in range(layers):
        names = ("attn_q", "attn_k", "attn_v", "attn_output")
        found += [(f"blk.{layer}.{name}.weight", (hidden, hidden)) for name in names]
        found += [
            (f"blk.{layer}.attn_q.bias", (hidden,)),
            (f"blk.{layer}.attn_norm.weight", (hidden,)),
        ]
        lead = (4,) if moe else ()
        tail = "_exps" if moe else ""
        found += [
            (f"blk.{layer}.ffn_{n}{tail}.weight", (*lead, FFN, hidden)) for n in ("gate", "up")
        ]
        found.append((f"blk.{layer}.ffn_down{tail}.weight", (*lead, hidden, FFN)))
        if moe:
            found.append((f"blk.{layer}.ffn_gate_inp.weight", (4, hidden)))
    return found


def _chosen(name: str, *, facts: ModelFacts = FACTS, has_importance: bool = False, **shape):
    tensors = _tensors(facts.layers, **shape)
    choices = choose_storages(find_scheme(name), tensors, facts, has_importance=has_importance)
    return {tensor: choice.tag for tensor, choice in choices.items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_vectors_are_fp32_and_matrices_have_types_that_exist(name: str) -> None:
    chosen = _chosen(name)
    assert set(chosen.values()) <= set(GGML_NUMBERS)
    for tensor, tag in chosen.items():
        assert (tag == "F32") == (tensor.endswith("bias") or "norm" in tensor or name == "f32")
    assert chosen["blk.9.attn_q.weight"] == find_scheme(name).base


def test_q4_k_m_gives_more_bits_where_it_counts() -> None:
    chosen = _chosen("q4_k_m")
    assert chosen["output.weight"] == "Q6_K"
    assert chosen["token_embd.weight"] == "Q4_K"
    better = [n for n in range(24) if chosen[f"blk.{n}.ffn_down.weight"] == "Q6_K"]
    assert better == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert better == [n for n in range(24) if chosen[f"blk.{n}.attn_v.weight"] == "Q6_K"]
    rest = {tag for n, tag in chosen.items() if "ffn_up" in n or "attn_k" in n or "attn_q.w" in n}
    assert rest == {"Q4_K"}


def test_a_tied_embedding_is_treated_as_the_head_that_it_is() -> None:
    assert _chosen("q4_k_m", tied=True)["token_embd.weight"] == "Q6_K"
    assert _chosen("q4_0", tied=True)["token_embd.weight"] == "Q6_K"
    assert _chosen("q8_0", tied=True)["token_embd.weight"] == "Q8_0"
    assert _chosen("f16", tied=True)["token_embd.weight"] == "F16"


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("q2_k", "Q4_0"),
        ("q3_k_s", "Q4_0"),
        ("q4_k_s", "Q5_0"),
        ("q5_k_s", "Q5_1"),
        ("q6_k", "Q8_0"),
        ("iq4_xs", "IQ4_NL"),
        ("q4_0", "Q4_0"),
    ],
)
def test_rows_that_are_no_whole_blocks_take_smaller_ones(name: str, smaller: str) -> None:
    tensors = _tensors(24, hidden=896)  # that of Qwen2-0.5B
    choices = choose_storages(find_scheme(name), tensors, FACTS, has_importance=False)
    assert choices["blk.9.attn_q.weight"].tag == smaller
    assert choices["blk.9.attn_q.weight"].wanted == find_scheme(name).base
    assert choices["output.weight"].tag == "Q8_0"
    assert _chosen(name, hidden=880)["blk.9.attn_q.weight"] == "F16"  # no whole blocks of 32


def test_an_importance_matrix_changes_what_llama_cpp_changes() -> None:
    plain, weighed = (_chosen("iq4_xs", has_importance=given) for given in (False, True))
    assert [plain[f"blk.{n}.ffn_down.weight"] for n in (2, 3)] == ["Q5_K", "IQ4_XS"]
    assert weighed["blk.2.ffn_down.weight"] == "IQ4_XS"
    assert _chosen("q4_0", has_importance=True)["blk.2.ffn_down.weight"] == "Q4_1"
    assert _chosen("q4_0")["blk.2.ffn_down.weight"] == "Q4_0"


def test_models_with_shared_keys_and_mixtures_have_rules_of_their_own() -> None:
    shared = ModelFacts("qwen2", layers=24, heads=16, kv_heads=2)
    assert _chosen("q2_k")["blk.9.attn_v.weight"] == "Q3_K"
    assert _chosen("q2_k", facts=shared)["blk.9.attn_v.weight"] == "Q4_K"
    assert _chosen("iq4_nl", facts=shared)["blk.9.attn_v.weight"] == "Q5_K"
    large = ModelFacts("qwen2", layers=80, heads=64, kv_heads=8)
    assert _chosen("q4_k_s", facts=large)["blk.9.attn_v.weight"] == "Q5_K"
    eight = ModelFacts("qwen2moe", layers=24, heads=16, kv_heads=16, experts=8)
    chosen = _chosen("q4_k_m", facts=eight, moe=True)
    assert chosen["blk.9.attn_v.weight"] == chosen["blk.9.attn_k.weight"] == "Q8_0"
    assert chosen["blk.9.attn_output.weight"] == "Q5_K"
    assert chosen["blk.9.ffn_gate_inp.weight"] == "F32"
    assert chosen["blk.0.ffn_down_exps.weight"] == "Q6_K"


def test_an_unknown_type_is_refused_with_the_nearest() -> None:
    assert find_scheme("Q4_K_M").name == "q4_k_m"
    with pytest.raises(UsageError, match=r"gguf: got 'q4_k'\. Did you mean"):
        find_scheme("q4_k")
