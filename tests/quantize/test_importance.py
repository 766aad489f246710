"""The importance matrix: what came into every column, as the whole model run at once shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwenkit.errors import UsageError
from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.load import load
from qwenkit.models.published import gguf_layout
from qwenkit.quantize.importance import compute_imatrix
from qwenkit.quantize.stream import LayerSource
from tiny import write_tiny_checkpoint

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "baichuan": {"max_position_embeddings": None, "model_max_length": 64, "z_loss_weight": 0},
}
ROWS = [
    [int(i) for i in torch.randint(0, 460, (n,), generator=torch.Generator().manual_seed(n))]
    for n in (30, 2, 17)
]


def _seen(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sums and counts of every matrix by hooks on the whole model, by its path."""
    model = load(folder, dtype="float32").model
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Any:
        def before(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            x = given[0].double()
            grouped = isinstance(module, GroupedLinear)
            groups = module.groups if isinstance(module, GroupedLinear) else 1
            pieces = list(segments(given[1])) if grouped else [(0, 0, len(x))]
            total = sums.setdefault(path, torch.zeros(groups, x.shape[1], dtype=torch.float64))
            for group, start, stop in pieces:
                total[group] += x[start:stop].square().sum(0)
                counts.setdefault(path, torch.zeros(groups))[group] += stop - start

        return before

    for path, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            module.register_forward_pre_hook(hook(path))
    with torch.inference_mode():
        for row in ROWS:
            model(torch.tensor(row), PackedCausal([len(row)]))
    return sums, counts


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_and_counts_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    config = {"model_type": name} | CONFIGS[name]
    folder = write_tiny_checkpoint(tmp_path, config=config)
    source, told = LayerSource(folder), []
    imatrix = compute_imatrix(source, ROWS, dataset="x.txt", progress=told.append)
    assert told[-1] == pytest.approx(1)
    assert (imatrix.datasets, imatrix.chunks, imatrix.chunk_tokens) == (("x.txt",), 3, 30)
    sums, counts = _seen(folder)
    wanted = {}
    for slot in gguf_layout(source.skeleton, source.architecture):
        if slot.is_matrix and slot.name.startswith("blk.") and "ffn_gate_inp" not in slot.name:
            wanted[slot.name] = slot
    assert imatrix.entries.keys() == wanted.keys()
    for entry, slot in wanted.items():
        found = imatrix.entries[entry]
        assert found.sums.shape == (slot.matrices, slot.columns)
        assert torch.equal(found.counts, counts[slot.path]), entry
        expected = sums[slot.path]
        error = (found.sums - expected).abs().sum() / expected.abs().sum()
        assert error < 0.02, entry  # activations between layers are held in bf16
    if "moe" in name:
        experts = imatrix.entries["blk.0.ffn_down_exps.weight"].counts
        assert experts.sum() == 2 * sum(map(len, ROWS))


def test_without_text_there_is_nothing_to_compute(tmp_path: Path) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path))
    with pytest.raises(UsageError, match="there is no row"):
        compute_imatrix(source, [])
