"""Every architecture of `qwenkit.models`, found by scanning, keeps the promises of a model."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch

from fake_devices import fake, on_fake_devices
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.runner import Runner
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import ByDevice, PackedCausal
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.models.spec import CausalModel, architectures
from qwenkit.parallel import DeviceMap, connect
from qwenkit.parallel.connect import model_parts

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
}
# A config.json for each model type; a new architecture adds its own line.
SETTINGS: dict[str, dict[str, Any]] = {
    "baichuan": {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    | {"model_max_length": 128, "z_loss_weight": 0},
    "llama": SIZES,
    "qwen": SIZES | {"seq_length": 9, "use_dynamic_ntk": False, "use_logn_attn": True},
    "qwen2": SIZES,
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": SIZES | {"head_dim": 16},
    "qwen3_moe": SIZES | EXPERTS | {"norm_topk_prob": True},
}
TOKENS = 23
BLOCKS = (7, 2, 39, 0, 11, 5)  # out of order, of 4 tokens each
CUTS = [(0, TOKENS), (0, 8, 9, 16, TOKENS), tuple(range(TOKENS + 1))]

_every_type = pytest.mark.parametrize("model_type", sorted(architectures()))


def _settings(model_type: str, *, tied: bool) -> dict[str, Any]:
    assert model_type in SETTINGS, (
        f"{model_type}: add the config.json of a tiny model to SETTINGS in this file"
    )
    own = {"model_type": model_type, "tie_word_embeddings": tied}
    return SETTINGS[model_type] | own


def _model(model_type: str, *, tied: bool = False) -> CausalModel:
    """A tiny random model in fp32."""
    architecture = architectures()[model_type]
    model = architecture.build(architecture.config(_settings(model_type, tied=tied)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name or "ln_" in name else 0, 0.3, generator=generator)
    model.dtype = torch.float32
    return model.eval()


def test_settings_belong_to_known_architectures() -> None:
    assert set(SETTINGS) <= set(architectures())


@_every_type
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cuts", CUTS, ids=["one piece", "chunks", "token by token"])
def test_paged_logits_are_the_packed_ones(
    model_type: str, tied: bool, cuts: tuple[int, ...]
) -> None:
    model = _model(model_type, tied=tied)
    ids = torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with reference_only(), torch.no_grad():
        expected = model(ids, PackedCausal([TOKENS]))  # [tokens, vocab_size]
    assert expected.shape == (TOKENS, model.config.vocab_size)
    runner = Runner(
        model, num_blocks=40, block_tokens=4, device=torch.device("cpu"), reference_ops=True
    )
    near = 1e-5 * expected.abs().max().item()
    for start, stop in pairwise(cuts):
        chunk = Chunk("a", tuple(ids[start:stop].tolist()), start, BLOCKS)
        logits = runner.run(Plan((chunk,)))  # [1, vocab_size]
        torch.testing.assert_close(logits[0], expected[stop - 1], rtol=0, atol=near)


@_every_type
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_split_between_its_layers_gives_the_same_bits(model_type: str, tied: bool) -> None:
    model = _model(model_type, tied=tied)
    parts = model_parts(model)
    assert {parts.part_of(name) for name, _ in model.named_parameters()} <= set(parts.paths)
    chunk = Chunk("a", tuple(range(TOKENS)), 0, BLOCKS)
    sizes: dict[str, Any] = {"num_blocks": 40, "block_tokens": 4, "reference_ops": True}
    cpu = torch.device("cpu")
    ids = torch.arange(TOKENS)
    with reference_only(), torch.no_grad():
        packed = model(ids, PackedCausal([TOKENS]))  # [tokens, vocab_size]
    paged = Runner(model, **sizes, device=cpu).run(Plan((chunk,)))  # [1, vocab_size]
    first, last = fake(0), fake(1)
    places = dict.fromkeys(parts.paths, first) | {parts.blocks[1]: last, parts.norm: "cpu"}
    placed = DeviceMap(parts, places | {parts.head: first if tied else last})
    with on_fake_devices():
        for path, place in placed.devices.items():
            if not (tied and path == parts.head):
                model.get_submodule(path).to(place)
        if tied:
            model.lm_head.weight = model.get_submodule(parts.embedding).weight
        connect(model, placed)
        layers = [torch.device(place) for place in placed.layer_devices]
        runner = Runner(model, **sizes, device=torch.device(first), layer_devices=layers)
        assert torch.equal(runner.run(Plan((chunk,))).cpu(), paged)
        with reference_only(), torch.no_grad():
            context = ByDevice(lambda device: PackedCausal([TOKENS], device=device))
            assert torch.equal(model(ids.to(first), context).cpu(), packed)


@_every_type
def test_packed_sequences_do_not_see_each_other(model_type: str) -> None:
    model = _model(model_type)
    ids = torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(2))
    with reference_only(), torch.no_grad():
        together = model(ids, PackedCausal([9, TOKENS - 9]))  # [tokens, vocab_size]
        alone = model(ids[9:], PackedCausal([TOKENS - 9]))  # [tokens - 9, vocab_size]
    near = 1e-5 * alone.abs().max().item()
    torch.testing.assert_close(together[9:], alone, rtol=0, atol=near)


@_every_type
def test_a_tied_head_shares_the_memory_of_the_embedding(model_type: str) -> None:
    for tied in (True, False):
        model = _model(model_type, tied=tied)
        embedding = next(m for m in model.modules() if isinstance(m, Embedding))
        head = model.get_parameter("lm_head.weight")
        assert isinstance(embedding.weight, torch.Tensor)
        assert (head.data_ptr() == embedding.weight.data_ptr()) is tied


@_every_type
def test_every_parameter_has_a_gguf_name(model_type: str) -> None:
    architecture = architectures()[model_type]
    named = set(architecture.gguf_names.values())
    assert len(named) == len(architecture.gguf_names), "two GGUF names lead to one of ours"
    for name, _ in _model(model_type).named_parameters():
        pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        assert pattern in named, f"{name} is not in gguf_names"


@_every_type
def test_adapters_default_to_linear_layers_that_exist(model_type: str) -> None:
    architecture = architectures()[model_type]
    assert architecture.lora_targets
    modules = dict(_model(model_type).named_modules())
    for target in architecture.lora_targets:
        hits = [m for path, m in modules.items() if path.rpartition(".")[2] == target]
        assert hits, f"{target} names no module"
        assert all(isinstance(module, Linear) for module in hits)


@_every_type
def test_names_of_parts_and_orders_are_gguf_names(model_type: str) -> None:
    architecture = architectures()[model_type]
    assert set(architecture.gguf_parts) <= set(architecture.gguf_names)
    parts = [part for names in architecture.gguf_parts.values() for part in names]
    steps = {step for name in [*architecture.gguf_names, *parts] for step in name.split(".")}
    assert set(architecture.gguf_interleaved) <= steps
    modules = dict(_model(model_type).named_modules())
    assert set(architecture.gguf_unit_rows) <= set(modules)
