"""The doctor on config.json: keys and values that cannot be meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from clean_models import PUBLISHED
from planting import (
    CONFIG_FILE,
    YARN,
    Plant,
    assert_found,
    config,
    faults,
    generation,
    kind_of,
    settings,
)

# (kind of fault, how it is planted)
PLANTED: list[tuple[str, Plant]] = [
    ("misspelt-key", config(use_dynamc_ntk=True)),
    ("misspelt-key", config(use_long_attn=True)),
    ("misspelt-key", config("rms_norm_eps", rms_norm_epsilon=1e-6)),
    ("misspelt-key", generation(repitition_penalty=1.05)),
    ("misspelt-key", settings(pading_side="left")),
    ("dead-key", config(use_dynamic_ntk=True)),
    ("dead-key", config(use_logn_attn=True)),
    ("dead-key", config(attention_bias=True)),
    ("dead-window", config(use_sliding_window=True, sliding_window=128, max_window_layers=2)),
    ("no-model-type", config("model_type")),
    ("unknown-model-type", config(model_type="qwen_2")),
    ("architectures-mismatch", config(architectures=["LlamaForCausalLM"])),
    ("bad-config", config(num_attention_heads=5)),
    ("bad-config", config("hidden_size")),
    ("wrong-eps", config(rms_norm_eps=1e-3)),
    ("wrong-eps", config(rms_norm_eps=1)),
    ("no-rope-theta", config("rope_theta")),
    ("bad-rope-scaling", config(rope_scaling=YARN | {"type": "yarm"})),
    ("bad-rope-scaling", config(rope_scaling={"type": "longrope", "factor": 4.0})),
    ("bad-rope-factor", config(rope_scaling={"rope_type": "yarn"})),
    ("bad-rope-factor", config(rope_scaling=YARN | {"factor": float("inf")})),
    ("bad-config", config(rope_scaling={"factor": 4.0})),
    ("bad-config", config(rope_scaling=YARN | {"beta_fast": 0.5})),
    ("misspelt-key", config(rope_scaling=YARN | {"original_max_position_embedings": 256})),
    ("misspelt-key", config(num_hiden_layers=3)),
    ("bad-rope-factor", config(rope_scaling={"type": "dynamic", "factor": 0.25})),
    ("bad-config", config(rope_parameters={"rope_type": "yarm", "rope_theta": 1e6})),
    ("bad-config", config(rope_scaling=YARN, rope_parameters=YARN | {"factor": 2.0})),
    ("two-rope-types", config(rope_scaling=YARN | {"rope_type": "linear"})),
    ("no-yarn-length", config(rope_scaling={"type": "yarn", "factor": 4.0})),
    ("unknown-quantization", config(quantization_config={"quant_method": "gptqq"})),
    ("bad-quantization", config(quantization_config="gptq")),
    ("quantized-in-name-only", config(quantization_config={"quant_method": "gptq", "bits": 4})),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=kind_of)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    assert_found(kind, plant, healthy, tmp_path)


@pytest.mark.parametrize(
    ("shape", "is_found"),
    [
        ((5120, 48, 13824), False),  # Qwen2.5-14B
        ((5120, 64, 27648), False),  # Qwen2.5-32B, QwQ-32B
        ((3584, 28, 18944), True),  # Qwen2.5-7B, whose published files all have 1e-06
    ],
)
def test_an_eps_of_1e_5_is_judged_by_the_shape(
    shape: tuple[int, int, int], is_found: bool, tmp_path: Path
) -> None:
    hidden, layers, ffn = shape
    values = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn}
    given = PUBLISHED["Qwen2-72B"] | values | {"num_attention_heads": 8, "rms_norm_eps": 1e-5}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(given))
    assert ("wrong-eps" in faults(tmp_path)) == is_found


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"type": "default"},
        {"type": "yarn", "original_max_position_embeddings": 256},
        {"type": "linear", "factor": 2},
    ],
)
def test_scalings_that_load_are_clean(block: object, healthy: Path, tmp_path: Path) -> None:
    folder = tmp_path / healthy.name
    shutil.copytree(healthy, folder)
    config(rope_scaling=block)(folder)
    assert faults(folder) == set()
