"""The formula: weights, keys and values to the byte, and what is asked for within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import write_first_generation
from qwenkit.engine.kv import NAMED_DTYPES, KVCache
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import UsageError
from qwenkit.formats.packed import PackedWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.cpu import memory as kernel_memory
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import Loaded, load
from qwenkit.models.catalogue import PUBLISHED, published_config
from qwenkit.models.spec import find
from qwenkit.survey import plan_memory
from qwenkit.survey.plan_memory import Memory, Workload, activation_bytes, estimate, kv_bytes
from qwenkit.survey.plan_source import find_shape
from qwenkit.survey.plan_weights import DEFAULT_GROUPS, Weights, weigh
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 160}
PLANS = {
    "auto": WeightPlan(),
    "fp32": WeightPlan("fp32"),
    "bf16": WeightPlan("bf16"),
    "int8": WeightPlan("int8"),
    "int8 groups of 64": WeightPlan("int8", group_size=64),
    "int4": WeightPlan("int4"),
    "int4 head bf16": WeightPlan("int4", head="bf16"),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 odd width": {"intermediate_size": 47},
    "qwen2 odd rows": {"vocab_size": 485},
}


def resident(loaded: Loaded) -> int:
    """Bytes of everything that the model holds, what is shared once."""
    held: dict[int, int] = {}
    for module in loaded.model.modules():
        if isinstance(module, QuantWeight):
            held[id(module)] = module.size_bytes
        else:
            for value in module.parameters(recurse=False):
                held[id(value)] = value.nbytes
    return sum(held.values())


def weighed(folder: Path, plan: WeightPlan) -> Weights:
    shape = find_shape(str(folder))
    return weigh(shape.architecture, shape.config, plan, shape.storage_of)


def of(name: str, plan: WeightPlan) -> tuple[Any, Weights]:
    """Config and weights of a published model."""
    given = published_config(name)
    assert given is not None
    architecture = find(given["model_type"])
    config = architecture.config(given)
    return config, weigh(architecture, config, plan, lambda tensor: "BF16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_take_what_loading_makes_of_them(
    name: str, plan: WeightPlan, dtype: torch.dtype, tmp_path: Path
) -> None:
    bind.register()
    config = CONFIG | SIZES | MODELS[name]
    tensors = {n: t.to(dtype) for n, t in tiny_tensors(config).items()}
    folder = write_tiny_checkpoint(tmp_path, config=config, tensors=tensors)
    weights = weighed(folder, plan)
    assert weights.held_bytes == resident(load(folder, plan=plan))
    assert sum(p.stored_bytes for p in weights.pieces) == sum(t.nbytes for t in tensors.values())
    assert weights.parameters == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_first_generation_is_weighed_like_the_others(plan: WeightPlan, tmp_path: Path) -> None:
    bind.register()
    folder = write_first_generation(tmp_path)
    assert weighed(folder, plan).held_bytes == resident(load(folder, plan=plan))


def test_blocks_of_a_gguf_are_weighed_as_stored(default_model_path: Path) -> None:
    bind.register()
    loaded = load(default_model_path, plan=WeightPlan())
    weights = weighed(default_model_path, WeightPlan())
    assert weights.held_bytes == resident(loaded)
    assert (weights.group, weights.rounds) == (32, True)


def test_a_matrix_of_many_slabs_is_rounded_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(101, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("int4", "int8", "bf16", "fp32"):
        whole = PackedWeight.round_to_nearest(matrix, kind)
        monkeypatch.setattr("qwenkit.formats.plan._SLAB_NUMBERS", 64 * 33)
        slabs = WeightPlan(kind, head=kind).apply("lm_head", matrix, is_head=True)
        assert isinstance(slabs, PackedWeight)
        assert slabs.storage == whole.storage
        for name, tensor in whole.named_buffers():
            assert torch.equal(dict(slabs.named_buffers())[name], tensor), (kind, name)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_keys_and_values_take_what_the_cache_takes(kind: str) -> None:
    config, weights = of("Qwen/Qwen2-0.5B", WeightPlan("int8"))
    work = Workload(users=3, tokens=50, kv_dtype=kind)
    cache = KVCache(
        num_layers=config.num_hidden_layers,
        num_blocks=3 * 4,
        block_tokens=16,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=NAMED_DTYPES[kind],
        device=torch.device("meta"),
    )
    assert kv_bytes(config, weights, work) == cache.size_bytes


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_auto_keys_and_values_are_what_the_engine_keeps(plan: WeightPlan, tmp_path: Path) -> None:
    from qwenkit.api import LLM

    folder = write_tiny_checkpoint(tmp_path, config=CONFIG | SIZES)
    shape = find_shape(str(folder))
    work = Workload(tokens=64)
    expected = kv_bytes(shape.config, weighed(folder, plan), work)
    with LLM(
        folder,
        weights=plan.weights,
        group_size=plan.group_size,
        head_weights=plan.head,
        kv_cache_tokens=64,
    ) as llm:
        assert llm._service._worker.engine._runner._cache.size_bytes == expected


def test_the_engine_has_these_constants() -> None:
    settings = EngineSettings()
    assert settings.block_tokens == plan_memory.BLOCK_TOKENS
    assert settings.max_batch_tokens == plan_memory.STEP_TOKENS
    assert settings.max_sequences == plan_memory.MOST_USERS
    assert kernel_memory.LARGE_BYTES == plan_memory._LARGE_BYTES
    matrix = torch.ones(16, 128)
    for kind in ("int4", "int8"):
        group = DEFAULT_GROUPS[kind]
        assert PackedWeight.round_to_nearest(matrix, kind).packed.group == group


def test_sums_of_parts() -> None:
    memory = Memory(
        process_bytes=1, weight_bytes=20, kv_bytes=300, activation_bytes=4000, loading_bytes=21
    )
    assert memory.running_bytes == memory.peak_bytes == 4321
    loading = Memory(
        process_bytes=1, weight_bytes=20, kv_bytes=3, activation_bytes=4, loading_bytes=99
    )
    assert loading.peak_bytes == 99


def test_activations_grow_to_one_step_and_with_users() -> None:
    config, weights = of("Qwen/Qwen2-0.5B", WeightPlan("int4"))
    sizes = [activation_bytes(config, weights, Workload(tokens=n)) for n in (16, 256, 512, 9999)]
    assert sizes == sorted(sizes)
    assert sizes[2] == sizes[3], "a longer prompt is computed in steps of 512"
    more = [activation_bytes(config, weights, Workload(users=n, tokens=512)) for n in (1, 8, 16)]
    assert more == sorted(set(more))


def test_mixtures_compute_with_the_chosen_experts_only() -> None:
    _, weights = of("Qwen/Qwen3-30B-A3B", WeightPlan("int4"))
    assert weights.inner_widths == (768,)
    assert weights.mlp_width == 8 * 768
    _, shared = of("Qwen/Qwen2-57B-A14B", WeightPlan("int4"))
    assert shared.inner_widths == (2560, 20480)
    assert shared.mlp_width == 20480


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_is_weighed_whole(name: str) -> None:
    config, weights = of(name, WeightPlan("int8"))
    assert weights.parameters == PUBLISHED[name].parameters
    memory = estimate(config, weights, Workload(), process_bytes=0)
    assert weights.parameters < memory.weight_bytes < 1.1 * weights.parameters
    assert weights.held_bytes < weights.loading_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"users": 0}, "users: got 0"),
        ({"users": 65}, "users: got 65; one engine runs at most 64"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"kv_dtype": "fp16"}, "kv_dtype: got 'fp16'. Did you mean 'bf16'"),
    ],
)
def test_work_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Workload(**given)
