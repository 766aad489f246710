"""What configs say of positions: every layout and type, and what is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.errors import ConfigError
from qwenkit.layers.position import DualChunk, Dynamic, Linear, Llama3, Rotary, Yarn
from qwenkit.models.config_rope import rotary_position

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(config: dict[str, Any]) -> Rotary | DualChunk:
    return rotary_position(config, head_dim=64, max_position_embeddings=32768, base=10000.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Rotary(64, 10000.0)),
        ({"rope_theta": 1e6}, Rotary(64, 1e6)),
        ({"rope_theta": 1e6, "rope_scaling": None}, Rotary(64, 1e6)),
        ({"rope_scaling": {"type": "default"}}, Rotary(64, 10000.0)),
        ({"rope_scaling": {}}, Rotary(64, 10000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rotary(64, 5e5)),
        ({"rope_scaling": YARN}, Rotary(64, 1e4, Yarn(factor=4.0, trained_tokens=32768))),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            Rotary(64, 1e4, Yarn(factor=2.0, trained_tokens=32768)),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8192}},
            Rotary(64, 1e4, Yarn(factor=4.0, trained_tokens=8192)),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 1e6},
            Rotary(64, 1e6, Linear(factor=2.0)),
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6}},
            Rotary(64, 1e6, Dynamic(factor=3.0, trained_tokens=32768)),
        ),
        (
            {"rope_scaling": LLAMA3},
            Rotary(
                64,
                1e4,
                Llama3(
                    factor=8.0,
                    low_frequency_factor=1.0,
                    high_frequency_factor=4.0,
                    trained_tokens=8192,
                ),
            ),
        ),
        (  # both layouts, of one mind
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}},
            Rotary(64, 1e6, Yarn(factor=4.0, trained_tokens=32768)),
        ),
    ],
)
def test_every_layout_is_read(config: dict[str, Any], expected: Rotary) -> None:
    assert read(config) == expected


def test_dual_chunk_attention_of_the_million_token_models() -> None:
    block = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    spec = read({"rope_theta": 1e7, "dual_chunk_attention_config": block})
    assert spec == DualChunk(
        rotary=Rotary(64, 1e7),
        chunk_tokens=262144,
        local_tokens=8192,
        trained_tokens=262144,
        squared=False,
    )
    assert spec.period == 253952
    twice = read({"dual_chunk_attention_config": {**block, "square_factor": True}})
    assert isinstance(twice, DualChunk)
    assert twice.squared


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"type": "yarm", "factor": 2.0}},
            r"rope_scaling: rope_type: got 'yarm'\. Did you mean 'yarn'\?",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            r"got 'mrope'\..*Without this block",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"Allowed: default, dynamic, linear"),
        ({"rope_parameters": {"rope_type": 7}}, r"rope_type: got 7"),
        ({"rope_scaling": "yarn"}, r"rope_scaling: expected a dictionary, got 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, r"each kind of layer is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor: expected a positive"),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling: factor: expected a positive"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling: factor: expected a positive"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling: rope_type: is missing beside factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor: expected .* from 1"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"factor"),
        ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, r"beta_fast: 0\.5 is below beta_slow 1"),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, r"attention_factor"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, r"truncate: expected true or false"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, r"low_freq_factor: 4 is not below"),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            r"rope_scaling: differs from rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor"),
        ({"rope_theta": 1.0}, r"rope_theta: 1 gives"),
        ({"dual_chunk_attention_config": {}, "use_sliding_window": True}, r"use_sliding_window"),
        ({"dual_chunk_attention_config": 3}, r"dual_chunk_attention_config: expected"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
            r"local_size 8 must be below chunk_size 8",
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8}, "rope_scaling": YARN},
            r"together with a rope scaling",
        ),
    ],
)
def test_what_cannot_be_used_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config)
