"""The doctor on single GGUF files: clean ones of every architecture, and planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_models import CLEAN
from planting import faults

from qwenkit.checkpoint import open_checkpoint, write_gguf
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.save import save_folder, save_gguf
from tiny import TEMPLATE

Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], Tensors], object]
UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(load(CLEAN["chat"](folder / "model")), folder / "Tiny-Instruct.gguf")
    return folder / "Tiny-Instruct.gguf"


@pytest.mark.parametrize("kind", CLEAN)
def test_none_is_found_in_clean_files(kind: str, tmp_path: Path) -> None:
    save_gguf(load(CLEAN[kind](tmp_path / "model")), tmp_path / "Model-7B.gguf")
    assert faults(tmp_path / "Model-7B.gguf") == set()


PLANTED: list[tuple[str, Change]] = [
    ("missing-tensor", lambda keys, tensors: tensors.pop(UP)),
    ("missing-tensor", lambda keys, tensors: keys.update({"qwen2.block_count": 3})),
    ("extra-tensor", lambda keys, tensors: tensors.update(ghost=tensors[UP])),
    ("wrong-shape", lambda keys, tensors: keys.update({"qwen2.feed_forward_length": 64})),
    ("non-finite", lambda keys, tensors: tensors.update({UP: tensors[UP] * float("nan")})),
    ("zero-weights", lambda keys, tensors: tensors.update({UP: tensors[UP] * 0})),
    ("no-template", lambda keys, tensors: keys.pop("tokenizer.chat_template")),
    ("broken-tokenizer", lambda keys, tensors: keys.update({"tokenizer.ggml.pre": "qwen9"})),
    (
        "wrong-eps",
        lambda keys, tensors: keys.update({"qwen2.attention.layer_norm_rms_epsilon": 1e-3}),
    ),
    (
        "bad-rope-scaling",
        lambda keys, tensors: keys.update({"qwen2.rope.scaling.type": "yarm"}),
    ),
    (
        "template-token",
        lambda keys, tensors: keys.update({"tokenizer.chat_template": TEMPLATE + "<|eot_id|>"}),
    ),
    (
        "unknown-model-type",
        lambda keys, tensors: keys.update(
            {k.replace("qwen2", "qwenn"): v for k, v in keys.items() if k.startswith("qwen2")},
            **{"general.architecture": "qwenn"},
        ),
    ),
]


@pytest.mark.parametrize(("kind", "change"), PLANTED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_planted_in_a_file_is_found(
    kind: str, change: Change, healthy: Path, tmp_path: Path
) -> None:
    read = open_checkpoint(healthy)
    keys: dict[str, Any] = {**read.gguf_metadata, "tokenizer.ggml.merges": ("str", [])}
    tensors = {name: tensor.read() for name, tensor in read.tensors.items()}
    change(keys, tensors)
    rows = [(name, tuple(tensor.shape), "F32", tensor) for name, tensor in tensors.items()]
    write_gguf(tmp_path / healthy.name, keys, rows)
    assert faults(tmp_path / healthy.name) == {kind}


def test_a_file_that_was_cut_is_named(healthy: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(healthy.read_bytes()[:-5000])
    assert faults(tmp_path / "m.gguf") == {"damaged-weights"}


@pytest.mark.parametrize("kind", ["chat", "qwen"])
def test_a_folder_saved_from_a_file_is_clean(kind: str, tmp_path: Path) -> None:
    save_gguf(load(CLEAN[kind](tmp_path / "model")), tmp_path / "m.gguf")
    save_folder(load(tmp_path / "m.gguf"), tmp_path / "again")
    assert faults(tmp_path / "again") == set()
    first, again = (load(tmp_path / name) for name in ("model", "again"))
    assert again.config == first.config
    assert again.model(torch.arange(4), PackedCausal([4])).equal(
        first.model(torch.arange(4), PackedCausal([4]))
    )
    if kind == "qwen":  # what the original's code looks for
        saved = json.loads((tmp_path / "again" / "config.json").read_text())
        names = {"kv_channels", "layer_norm_epsilon", "rotary_emb_base", "seq_length", "no_bias"}
        assert names <= set(saved)
        assert not {"head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"} & set(saved)
