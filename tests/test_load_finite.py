"""A checkpoint with a number that is none is refused by file and tensor, whatever is made of it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.errors import NonFiniteError
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels.blocks import BLOCK_LAYOUTS
from qwenkit.kernels.finite import is_finite
from qwenkit.load import load
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

PLANS = [None, WeightPlan(), *(WeightPlan(kind) for kind in ("int4", "int8", "bf16", "fp32"))]
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_plain_tensor_is_refused_by_name(
    plan: WeightPlan | None, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    for name in NAMES:
        tensors = {n: t.to(dtype) for n, t in tiny_tensors(CONFIG).items()}
        tensors[name].view(-1)[-3] = value
        folder = write_tiny_checkpoint(tmp_path / name, tensors=tensors)
        file = folder / "model.safetensors"
        with pytest.raises(NonFiniteError, match=re.escape(f"{file}: {name}: ")):
            load(folder, plan=plan)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_a_scale_of_a_gguf_is_refused_by_the_files_own_name(
    storage: str, plan: WeightPlan | None, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 300}
    file = tmp_path / "model.gguf"
    write_random_gguf(file, CONFIG | sizes, storage=storage, head_storage="Q8_0")
    load(file, plan=plan)
    for name in ("blk.1.ffn_up.weight", "blk.0.attn_q.weight", "token_embd.weight"):
        stored = open_checkpoint(file).tensors[name]
        layout, whole = BLOCK_LAYOUTS[stored.storage], file.read_bytes()
        place = whole.index(stored.read().numpy().tobytes()) + layout.half_offsets[0]
        place += 5 * layout.block_bytes
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(whole[:place] + b"\x01\x7c" + whole[place + 2 :])  # a NaN
        with pytest.raises(NonFiniteError, match=re.escape(f"{damaged}: {name}: ")):
            load(damaged, plan=plan)


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_scale_of_every_block_type_is_refused(block_type: str, packed: bool) -> None:
    columns = 2 * max(32, BLOCK_LAYOUTS[block_type].block_columns)
    numbers = torch.randn(70, columns, generator=torch.Generator().manual_seed(0))
    whole = GgmlWeight.quantize(numbers, block_type)
    plan = WeightPlan()
    plan.apply("layer", whole, is_head=False)
    for offset in BLOCK_LAYOUTS[block_type].half_offsets:
        blocks = whole.blocks.clone()
        block = blocks.view(len(blocks), -1, BLOCK_LAYOUTS[block_type].block_bytes)[69, 1]
        block[offset : offset + 2] = torch.tensor([0x00, 0xFC], dtype=torch.uint8)  # -inf
        damaged = GgmlWeight(blocks, block_type)
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            plan.apply("layer", damaged, is_head=False) if packed else damaged.check_finite()


@pytest.mark.parametrize("numbers", [1, 33, 70_000, (1 << 15) + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_number_anywhere_is_found(numbers: int, dtype: torch.dtype) -> None:
    tensor = torch.full((numbers,), float(torch.finfo(dtype).max), dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for place in (0, numbers // 2, numbers - 1):
        for value in (math.nan, math.inf, -math.inf):
            changed = tensor.clone()
            changed[place] = value
            assert not is_finite(changed)
            assert not is_finite(changed.view(1, -1, 1).transpose(1, 2))
