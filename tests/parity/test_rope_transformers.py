"""Every rope scaling against transformers: tables, logits below and beyond the trained length, and
greedy decoding through the paged engine, in `as-config` mode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.fill import fill
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.position import Rotary, choose_extension, extended
from qwenkit.layers.rope import rotary_tables
from qwenkit.models.spec import CausalModel, find
from qwenkit.types.events import FinishEvent, TokenEvent
from qwenkit.types.sampling import SamplingParams

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TRAINED = 32
TINY = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-fraction": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic-1": {"rope_type": "dynamic", "factor": 1.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn-original": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "yarn-betas": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-close-betas": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 2.0, "beta_slow": 2.0},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
    },
    "yarn-one-mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.707},
    "yarn-no-truncation": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def make_pair(
    model_type: str, scaling: dict[str, Any], folder: Path, *, std: float = 0.3
) -> tuple[Any, CausalModel]:
    """A random transformers model, and ours read from the checkpoint it saves."""
    torch.manual_seed(0)
    rope = {"rope_theta": 10000.0, **scaling}
    config = transformers.AutoConfig.for_model(model_type, **TINY, rope_parameters=rope)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else std)
    theirs = theirs.to(torch.float32).eval()
    theirs.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    architecture = find(checkpoint.config["model_type"])
    with torch.device("meta"):
        ours = architecture.build(architecture.config(checkpoint.config))
    ours.dtype = torch.float32
    fill(ours, architecture, checkpoint)
    return theirs, ours


def their_tables(scaling: dict[str, Any], base: float, head_dim: int, length: int) -> Any:
    """Cosine and sine of a fresh rotary embedding for one sequence: [length, head_dim / 2]."""
    rope = {"rope_theta": base, **scaling}
    config = transformers.AutoConfig.for_model(
        "qwen2", **TINY | {"hidden_size": 4 * head_dim}, rope_parameters=rope
    )
    embedding = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
    return config, cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]


@pytest.mark.parametrize("length", [7, TRAINED, 100, 300])
@pytest.mark.parametrize(("base", "head_dim"), [(10000.0, 16), (1e6, 128)])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_theirs(name: str, base: float, head_dim: int, length: int) -> None:
    config, cos, sin = their_tables(SCALINGS[name], base, head_dim, length)
    spec = find("qwen2").config(config.to_dict()).position
    assert isinstance(spec, Rotary)
    extension = choose_extension(
        spec,
        "as-config",
        trained_tokens=TRAINED,
        prompt_tokens=length,
        total_tokens=length + 50,
    )
    got = rotary_tables(extended(spec, extension), torch.arange(length))
    # a table's error is that of its angle, which fp32 knows to 1e-7 of itself
    for ours, expected in zip(got, (cos, sin), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7 * max(length, 16))


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_agree_below_and_beyond(name: str, model_type: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(model_type, SCALINGS[name], tmp_path)
    for length in (20, TRAINED, 50, 150):
        ids = torch.randint(0, TINY["vocab_size"], (length,))
        with torch.no_grad():
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # forget lengths
            expected = theirs(ids[None]).logits[0]
            got = ours(ids, PackedCausal([length]))
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["linear", "yarn", "yarn-mscale"])
def test_the_old_layout_says_the_same(name: str, tmp_path: Path) -> None:
    _, ours = make_pair("qwen2", SCALINGS[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    block = config.pop("rope_parameters")
    config["rope_theta"] = block.pop("rope_theta")
    block["type"] = block.pop("rope_type")
    config["rope_scaling"] = block
    assert find("qwen2").config(config).position == ours.config.position


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn-attention", "llama3"])
def test_greedy_decoding_across_the_trained_length(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair("qwen2", SCALINGS[name], tmp_path, std=0.6)
    rows = [torch.randint(0, TINY["vocab_size"], (n,)).tolist() for n in (9, 31, 60)]
    expected = []
    for row in rows:
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        expected.append(_greedy(theirs, row, 40))
    engine = Engine(
        ours,
        _Ids(),  # type: ignore[arg-type]
        EngineSettings(block_tokens=4, kv_cache_tokens=1024, max_batch_tokens=16, max_sequences=8),
        stop_token_ids=(),
        context_tokens=256,
        trained_tokens=TRAINED,
        rope="as-config",
    )
    for number, row in enumerate(rows):
        sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=0)
        engine.add(Request(str(number), tuple(row), sampling))
    got: dict[str, list[int]] = {str(number): [] for number in range(len(rows))}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                got[event.request_id].append(event.token_id)
            else:
                assert isinstance(event, FinishEvent)
                assert event.reason == "length"
    for number, (ids, gaps) in enumerate(expected):
        ours_ids = got[str(number)]
        differ = next((i for i in range(40) if ours_ids[i] != ids[i]), None)
        assert differ is None or gaps[differ] < 1e-5, f"token {differ}: {ours_ids} {ids}"
        assert len(set(ids)) >= 20


def _greedy(model: Any, row: list[int], count: int) -> tuple[list[int], list[float]]:
    """transformers' own loop with a cache; the ids, and how far the two best were apart."""
    ids, gaps, cache = list(row), [], None
    step = torch.tensor([row])
    for _ in range(count):
        with torch.no_grad():
            out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        gaps.append((best.values[0] - best.values[1]).item())
        ids.append(int(best.indices[0]))
        step = torch.tensor([[ids[-1]]])
    return ids[len(row) :], gaps


class _Ids:
    """A tokenizer for a model without text."""

    vocab_size = TINY["vocab_size"]
    control_tokens: dict[str, int] = {}  # noqa: RUF012

    def stream(self, *, skip_special: bool = True) -> _Ids:
        return self

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
