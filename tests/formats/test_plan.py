"""What a plan makes of a model: every architecture computes nearly what it did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import FIRST, first_tensors, write_first_generation
from qwenkit.checkpoint import write_safetensors
from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.formats.packed import PackedWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.load import load
from qwenkit.models.published import published_tensors
from qwenkit.models.spec import CausalModel, find
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 96}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "qwen": {},
    "baichuan": {"max_position_embeddings": None, "model_max_length": 64, "z_loss_weight": 0},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 32},  # whole panels for every expert
    "qwen2_moe uneven": EXPERTS | {"moe_intermediate_size": 24},
}
PLANS = {
    "auto": WeightPlan(),
    "fp32": WeightPlan("fp32"),
    "bf16": WeightPlan("bf16"),
    "int8": WeightPlan("int8"),
    "int4": WeightPlan("int4", group_size=64),
    "int4 head": WeightPlan("int4", head="int4"),
}
TIED = {"tie_word_embeddings": True}
IDS = torch.randint(0, 256, (19,), generator=torch.Generator().manual_seed(3))
_names = pytest.mark.parametrize("name", CONFIGS)
_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def written(folder: Path, name: str) -> Path:
    """Weights small enough that attention is not sharp: an error then stays what it is."""
    model_type = name.split()[0]
    if model_type == "qwen":
        first = SIZES | {"kv_channels": 16}
        tensors = first_tensors(FIRST | first)
        tensors = {n: t if "ln_" in n else t / 3 for n, t in tensors.items()}
        return write_first_generation(folder, config=first, tensors=tensors)
    config = CONFIG | SIZES | CONFIGS[name] | {"model_type": model_type}
    architecture = find(model_type)
    model = architecture.build(architecture.config(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(float(parameter.ndim == 1), 0.1, generator=generator)
    tensors = {named.name: named.tensor.contiguous() for named in published_tensors(model)}
    return write_tiny_checkpoint(folder, config=config, tensors=tensors)


def logits(model: CausalModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS, PackedCausal([len(IDS)]))  # [tokens, vocab_size]
        return result


def weights(model: CausalModel) -> dict[str, PackedWeight]:
    """Of every layer, by its path: all are packed."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear | Embedding | GroupedLinear):
            assert isinstance(module.weight, PackedWeight), path
            found[path] = module.weight
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The difference beside what distinguishes a position's logits."""
    spread = want - want.mean(1, keepdim=True)
    return float((got - want).norm() / spread.norm())


@_names
def test_numbers_as_stored_compute_the_same(name: str, tmp_path: Path) -> None:
    bind.register()
    folder = written(tmp_path, name)
    plain = logits(load(folder).model)
    for plan in (PLANS["auto"], PLANS["fp32"]):
        model = load(folder, plan=plan).model
        assert weights(model)
        assert error(logits(model), plain) < 1e-5
        with reference_only():
            assert error(logits(model), plain) < 1e-5


@_names
@pytest.mark.parametrize(("kind", "limit"), [("bf16", 0.01), ("int8", 0.03), ("int4", 0.4)])
def test_rounded_numbers_compute_nearly_the_same(
    name: str, kind: str, limit: float, tmp_path: Path
) -> None:
    bind.register()
    folder = written(tmp_path, name)
    with reference_only():
        plain = logits(load(folder).model)
    model = load(folder, plan=PLANS[kind]).model
    fast = logits(model)
    with reference_only():
        exact = logits(model)
    assert 1e-4 < error(exact, plain) < limit, "of the weights"
    assert error(fast, exact) < 0.02, "of the activations"


@_plans
def test_each_part_gets_its_kind(plan: WeightPlan, tmp_path: Path) -> None:
    model = load(written(tmp_path, "qwen2_moe"), plan=plan).model
    kinds = {path: weight.kind for path, weight in weights(model).items()}
    body = "fp32" if plan.weights == "auto" else plan.weights
    head = plan.head or ("int8" if body == "int4" else body)
    heads = {"lm_head", "model.embed_tokens"}
    routers = {p for p in kinds if p.endswith(("mlp.gate", "shared_expert_gate"))}
    assert len(routers) == 4
    assert {kinds.pop(path) for path in heads} == {head}
    assert {kinds.pop(path) for path in routers} == {"fp32"}, "routers stay as they are"
    assert set(kinds.values()) == {body}
    precise = {path for path, weight in weights(model).items() if weight.precise}
    assert precise == heads | {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}


@_plans
def test_a_tied_head_shares_the_packed_embedding(plan: WeightPlan, tmp_path: Path) -> None:
    config = CONFIG | SIZES | TIED
    tensors = tiny_tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    models = []
    for case, own in (("none", {}), ("same", {"lm_head.weight": embedding.clone()})):
        folder = write_tiny_checkpoint(tmp_path / case, config=config, tensors=tensors | own)
        model = load(folder, plan=plan).model
        parts = weights(model)
        assert parts["lm_head"] is parts["model.embed_tokens"]
        assert parts["lm_head"].precise
        models.append(model)
    assert torch.equal(logits(models[0]), logits(models[1]))
    other = tensors | {"lm_head.weight": embedding.flip(0)}
    folder = write_tiny_checkpoint(tmp_path / "other", config=config, tensors=other)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs"):
        load(folder, plan=plan)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_named(bad: float, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    tensors = tiny_tensors(CONFIG)
    path = "model.layers.1.mlp.up_proj"
    tensors[f"{path}.weight"][3, 4] = bad
    write_safetensors(folder / "model.safetensors", tensors)
    for plan in (PLANS["int8"], WeightPlan("int4")):
        with pytest.raises(
            NonFiniteError, match=rf"safetensors: {path}\.weight: .* NaN or infinite"
        ):
            load(folder, plan=plan)


def test_columns_that_no_group_divides_stay_as_stored(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, config={"intermediate_size": 48})
    parts = weights(load(folder, plan=WeightPlan("int4")).model)
    assert parts["model.layers.0.mlp.down_proj"].kind == "fp32"
    assert parts["model.layers.0.mlp.up_proj"].kind == "int4"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("int5", None, None), r"^weights: got 'int5'\. .*'int[48]'"),
        (("int4", 48, None), "^group_size: got 48; choose one of 32, 64 and 128"),
        (("bf16", 32, None), "^group_size: only weights int4 and int8"),
        (("auto", 32, None), "^group_size: only weights int4 and int8"),
        (("int4", None, "auto"), "^head_weights: got 'auto'"),
        (("auto", None, "int8"), "^head_weights: needs weights to be something else than auto"),
    ],
)
def test_plans_that_say_nothing_are_refused(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        WeightPlan(*given)
