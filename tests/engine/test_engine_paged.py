"""The paged context gives a model what `PackedCausal` gives it, however a prompt is cut up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fakes import tiny_model
from qwenkit.engine.batch import build
from qwenkit.engine.kv import KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.runner import Runner
from qwenkit.errors import UsageError
from qwenkit.kernels import kv_int4
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.paged_attention import paged_attention
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import PackedCausal
from qwenkit.models import qwen2

CPU = torch.device("cpu")
BLOCK_TOKENS = 4


def all_logits(model: qwen2.Model, ids: list[int]) -> torch.Tensor:
    with reference_only():  # as `runner` computes: other tests register native kernels
        logits: torch.Tensor = model(torch.tensor(ids), PackedCausal([len(ids)]))
    return logits


def assert_near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    most = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * most)


def runner(model: qwen2.Model, num_blocks: int = 40) -> Runner:
    return Runner(
        model, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, device=CPU, reference_ops=True
    )


def chunk(name: str, ids: list[int], start: int, stop: int, blocks: Iterable[int]) -> Chunk:
    """Of the sequence `ids` the part from `start` to `stop`, its logits wanted."""
    return Chunk(name, tuple(ids[start:stop]), start, tuple(blocks))


def random_ids(seed: int, count: int) -> list[int]:
    return torch.randint(0, 258, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    "cuts",
    [(23,), (8, 16, 23), (1, 2, 9, 10, 22, 23), tuple(range(1, 24))],
    ids=["one piece", "blocks", "odd chunks", "token by token"],
)
@pytest.mark.parametrize("blocks", [(0, 1, 2, 3, 4, 5), (7, 2, 39, 0, 11, 5)], ids=["row", "mixed"])
def test_a_prompt_gives_the_same_logits_however_it_is_cut(
    cuts: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    model, ids = tiny_model(), random_ids(1, 23)
    expected = all_logits(model, ids)
    run = runner(model)
    start = 0
    for stop in cuts:
        logits = run.run(Plan((chunk("a", ids, start, stop, blocks),)))
        assert_near(logits[0], expected[stop - 1])
        start = stop


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_sequences_of_different_lengths_share_a_batch(kv_heads: int, tied: bool) -> None:
    model = tiny_model(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    ids = {name: random_ids(seed, 30) for seed, name in enumerate("abcd")}
    expected = {name: all_logits(model, row) for name, row in ids.items()}
    blocks = {"a": range(8), "b": (39, 8, 38, 9, 37, 10, 36, 11), "c": range(12, 20)}
    blocks["d"] = range(35, 27, -1)
    run = runner(model)
    # decode beside chunks: each name's parts, one step a column
    steps = (
        {"a": (0, 11), "b": (0, 1)},
        {"a": (11, 12), "b": (1, 2), "c": (0, 9)},
        {"a": (12, 13), "b": (2, 17), "c": (9, 30), "d": (0, 30)},
        {"b": (17, 30), "a": (13, 14)},
        {"a": (14, 30)},
    )
    for step in steps:
        chunks = [chunk(name, ids[name], *part, blocks[name]) for name, part in step.items()]
        logits = run.run(Plan(tuple(chunks)))
        wanted = torch.stack([expected[name][stop - 1] for name, (_, stop) in step.items()])
        assert_near(logits, wanted)


def test_only_the_rows_to_be_sampled_reach_the_head() -> None:
    model, ids = tiny_model(), random_ids(2, 12)
    middle = Chunk("b", tuple(ids[:5]), 0, (3, 4), 0, sample=False)
    plan = Plan((chunk("a", ids, 0, 7, (0, 1)), middle, chunk("c", ids, 0, 1, (9,))))
    logits = runner(model).run(plan)
    assert logits.shape == (2, 272)
    assert_near(logits, all_logits(model, ids)[[6, 0]])
    assert runner(model).run(Plan((middle,))).shape == (0, 272)


def test_a_batch_puts_every_token_into_its_own_slot() -> None:
    ids = list(range(100, 120))
    plan = Plan((chunk("a", ids, 3, 6, (5, 2)), chunk("b", ids, 8, 9, (0, 9, 1))))
    batch = build(plan, block_tokens=4, device=CPU)
    assert batch.ids.tolist() == [103, 104, 105, 108]
    assert batch.positions.tolist() == [3, 4, 5, 8]
    assert batch.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 4]
    assert batch.block_tables.tolist() == [[5, 2, 0], [0, 9, 1]]
    assert (batch.query_lengths.tolist(), batch.kv_lengths.tolist()) == ([3, 1], [6, 9])
    assert batch.rows is not None
    assert batch.rows.tolist() == [2, 3]


def test_a_layer_without_position_embedding_is_not_rotated() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(
        num_layers=1,
        num_blocks=3,
        block_tokens=4,
        kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
    )
    q = torch.randn(9, 4, 8, generator=generator)
    k, v = torch.randn(2, 9, 2, 8, generator=generator)
    plan = Plan((chunk("a", list(range(9)), 0, 9, (0, 1, 2)),))
    context = PagedAttention(cache, build(plan, block_tokens=4, device=CPU))
    expected = PackedCausal([9]).attend(0, q, k, v, None)
    torch.testing.assert_close(context.attend(0, q, k, v, None), expected, rtol=0, atol=1e-6)
    assert torch.equal(cache.keys[0].flatten(0, 1)[:9], k)


def test_bfloat16_is_kept_in_bfloat16() -> None:
    model = tiny_model().to(torch.bfloat16)
    model.dtype = torch.bfloat16
    ids = random_ids(3, 20)
    run = runner(model)
    run.run(Plan((chunk("a", ids, 0, 12, range(5)),)))
    logits = run.run(Plan((chunk("a", ids, 12, 20, range(5)),)))
    expected = all_logits(model, ids)[-1]
    assert logits.dtype == torch.bfloat16
    assert (logits[0] - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("blocks", [10**12, 10**17, 10**25])  # of memory, of bytes, of 64 bits
def test_a_cache_that_cannot_be_had_names_the_setting(blocks: int) -> None:
    said = r"^kv_cache_tokens: .*0 tokens,.* GB, which cpu does not give.*\(--context N\)\.$"
    with pytest.raises(UsageError, match=said):
        KVCache(
            num_layers=1,
            num_blocks=blocks,
            block_tokens=16,
            kv_heads=2,
            head_dim=8,
            dtype=torch.float32,
            device=CPU,
        )


@pytest.mark.parametrize(
    ("dtype", "error", "head_bytes"),
    [
        (torch.float32, 1e-6, 32),
        (torch.bfloat16, 0.02, 16),
        (torch.int8, 0.02, 8 + 4),
        (torch.uint8, 0.3, 20),
    ],
)
def test_attention_over_a_narrow_cache_stays_near(
    dtype: torch.dtype, error: float, head_bytes: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(
        num_layers=2,
        num_blocks=3,
        block_tokens=4,
        kv_heads=2,
        head_dim=8,
        dtype=dtype,
        device=CPU,
    )
    q = torch.randn(9, 4, 8, generator=generator)
    k, v = torch.randn(2, 9, 2, 8, generator=generator)
    plan = Plan((chunk("a", list(range(9)), 0, 9, (2, 0, 1)),))
    context = PagedAttention(cache, build(plan, block_tokens=4, device=CPU))
    expected = PackedCausal([9]).attend(0, q, k, v, None)
    torch.testing.assert_close(context.attend(1, q, k, v, None), expected, rtol=0, atol=error)
    assert cache.bytes_per_token == 2 * 2 * 2 * head_bytes
    assert cache.size_bytes == 3 * 4 * cache.bytes_per_token


def test_a_cache_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="int16 was asked"):
        KVCache(
            num_layers=1,
            num_blocks=1,
            block_tokens=4,
            kv_heads=2,
            head_dim=8,
            dtype=torch.int16,
            device=CPU,
        )


def test_untouched_blocks_cost_no_memory_but_are_counted() -> None:
    cache = KVCache(
        num_layers=3,
        num_blocks=5,
        block_tokens=4,
        kv_heads=2,
        head_dim=8,
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert cache.size_bytes == 2 * 3 * 5 * 4 * 2 * 8 * 2


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query [heads, head_dim] over k and v [keys, kv_heads, head_dim] in float64; bias [heads,
    keys].
    """
    rows = []
    for head, query in enumerate(q):
        kv_head = head // (len(q) // k.shape[1])
        weights = torch.softmax(k[:, kv_head] @ query * scale + bias[head], 0)  # [keys]
        rows.append(weights @ v[:, kv_head])
    return torch.stack(rows)


def stands_for(
    cache: torch.Tensor, scales: torch.Tensor | None, slots: list[int], head_dim: int
) -> torch.Tensor:
    """What the cache's slots hold, in float64: [slots, kv_heads, head_dim]."""
    stored = cache.flatten(0, 1)[slots]
    if cache.dtype is torch.uint8:
        stored = kv_int4.dequantize(stored, head_dim)
    rows = stored.double()
    return rows if scales is None else rows * scales.flatten(0, 1)[slots, :, None].double()


@pytest.mark.parametrize("case", list(paged_attention.cases()))
def test_paged_attention_is_attention_written_out(case: tuple[Any, ...]) -> None:
    q, key_cache, value_cache, tables, query_lengths, kv_lengths, scale, *rest = case
    window, slopes, key_scales, value_scales = rest or (0, None, None, None)
    output = paged_attention(*case)
    assert output.shape == q.shape
    assert output.is_contiguous()
    block_tokens, row = key_cache.shape[1], 0
    tolerance = 2e-5
    if key_cache.dtype is torch.bfloat16:  # queries and the values' weights may be rounded as well
        q, tolerance = q.bfloat16(), 2**-8
    if slopes is None:
        slopes = torch.zeros(q.shape[1])
    for table, length, kv_length in zip(
        tables.tolist(), query_lengths.tolist(), kv_lengths.tolist(), strict=True
    ):
        slots = [
            table[p // block_tokens] * block_tokens + p % block_tokens for p in range(kv_length)
        ]
        keys = stands_for(key_cache, key_scales, slots, q.shape[2])
        values = stands_for(value_cache, value_scales, slots, q.shape[2])
        for position in range(kv_length - length, kv_length):
            seen = range(max(0, position + 1 - window) if window else 0, position + 1)
            distance = torch.tensor(seen).double() - position
            bias = slopes.double()[:, None] * distance
            part = slice(seen.start, seen.stop)
            expected = softmax_attention(q[row].double(), keys[part], values[part], bias, scale)
            torch.testing.assert_close(
                output[row].double(),
                expected,
                rtol=1e-4,
                atol=tolerance * values.abs().max().item(),
            )
            row += 1


def test_kv_write_changes_its_slots_and_nothing_else() -> None:
    for k, v, key_cache, value_cache, slots, *scales in kv_write.cases():
        before = key_cache.clone(), value_cache.clone()
        assert kv_write(k, v, key_cache, value_cache, slots, *scales) is None
        pairs = zip((key_cache, value_cache), before, (k, v), strict=True)
        for index, (cache, old, new) in enumerate(pairs):
            kept = torch.ones(cache.shape[0] * cache.shape[1], dtype=torch.bool)
            kept[slots] = False
            assert torch.equal(cache.flatten(0, 1)[kept], old.flatten(0, 1)[kept])
            got = cache.flatten(0, 1)[slots]
            if scales:
                factors = scales[index].flatten(0, 1)[slots]
                finite = new.isfinite().all(-1)
                assert torch.equal(factors.isfinite(), finite)
                error = (got.float() * factors[..., None] - new)[finite]
                assert (error.abs() <= factors[finite][..., None] * 0.5001 + 1e-43).all()
                assert got.abs().max() <= 127
            elif cache.dtype is torch.uint8:  # what the bytes mean: tests/kernels/test_kv_int4.py
                assert torch.equal(got, kv_int4.quantize(new.float()))
            else:
                want = new.to(cache.dtype)
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
