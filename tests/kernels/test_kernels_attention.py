"""What the native attention promises beyond its contract: a token's result is the same bits in any
batch, any cut of the prompt into chunks, any place in the cache and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build, kv_int4
from qwenkit.kernels.cpu.bind import cpu_features, load_kernels
from qwenkit.kernels.cpu.library import Kernel
from qwenkit.kernels.ops.paged_attention import paged_attention

BLOCK_TOKENS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)


@cache
def _load(variant: build.Variant) -> dict[str, Kernel]:
    try:
        if not variant.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {variant.name}")
        return load_kernels(build.build_variant(variant))
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(params=[pytest.param(v, id=v.name) for v in build.VARIANTS])
def kernels(request: pytest.FixtureRequest) -> dict[str, Kernel]:
    return _load(request.param)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Story:
    """One sequence of random queries, keys and values, and its keys and values in a cache."""

    def __init__(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        window: int = 0,
        alibi: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(tokens, heads, head_dim, generator=generator)
        self.k = torch.randn(tokens, kv_heads, head_dim, generator=generator)
        self.v = torch.randn(tokens, kv_heads, head_dim, generator=generator)
        self.count = -(-tokens // BLOCK_TOKENS)
        self.table = torch.randperm(self.count + 2, generator=generator)[: self.count]
        shape = (self.count + 2, BLOCK_TOKENS, kv_heads, head_dim)
        empty = torch.full(shape, torch.nan)
        self.scales: tuple[torch.Tensor | None, ...] = None, None
        if dtype is torch.uint8:
            shape = *shape[:3], kv_int4.row_bytes(head_dim)
            self.keys, self.values = torch.full((2, *shape), 255, dtype=dtype).unbind()
        elif dtype is torch.int8:
            self.keys, self.values = torch.zeros(2, *shape, dtype=dtype).unbind()
            self.scales = empty[..., 0].clone(), empty[..., 0].clone()
        else:
            self.keys, self.values = empty.to(dtype, copy=True), empty.to(dtype, copy=True)
        slopes = torch.linspace(0.5, 0.01, heads) if alibi else None
        self.options = head_dim**-0.5, window, slopes, *self.scales

    def fill(self, kernels: dict[str, Kernel]) -> None:
        places = torch.arange(len(self.k))
        slots = self.table[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS
        kernels["kv_write"](self.k, self.v, self.keys, self.values, slots, *self.scales)

    def attend(self, kernels: dict[str, Kernel], first: int, last: int) -> torch.Tensor:
        """Queries first … last - 1, alone in a call."""
        result: torch.Tensor = kernels["paged_attention"](
            self.q[first:last],
            self.keys,
            self.values,
            self.table[None],
            torch.tensor([last - first]),
            torch.tensor([last]),
            *self.options,
        )
        return result


SHAPES = [(9, 3, 64), (14, 2, 64), (4, 4, 10), (5, 1, 128), (2, 1, 2)]
_every_shape = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)


@_every_shape
def test_chunks_of_a_prompt_give_the_same_bits(
    kernels: dict[str, Kernel], heads: int, kv_heads: int, head_dim: int
) -> None:
    story = Story(75, heads, kv_heads, head_dim, seed=1)
    story.fill(kernels)
    whole = story.attend(kernels, 0, 75)
    assert not whole.isnan().any()
    for cut in ([1, 75], [7, 8, 24, 75], [16, 32, 48, 64, 75], list(range(1, 76))):
        pieces = [story.attend(kernels, a, b) for a, b in zip([0, *cut], cut, strict=False)]
        assert torch.equal(torch.cat(pieces), whole)
    torch.set_num_threads(1)
    assert torch.equal(story.attend(kernels, 0, 75), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "alibi"), [(0, False), (0, True), (37, False), (300, True)])
def test_chunks_give_the_same_bits_over_any_cache(
    request: pytest.FixtureRequest,
    kernels: dict[str, Kernel],
    dtype: torch.dtype,
    window: int,
    alibi: bool,
) -> None:
    """Three segments of keys, more rows of queries than one piece of work has."""
    story = Story(600, 7, 1, 80, seed=2, dtype=dtype, window=window, alibi=alibi)
    story.fill(kernels)
    whole = story.attend(kernels, 0, 600)
    assert not whole.isnan().any()
    want = story.attend({"paged_attention": paged_attention.reference}, 0, 600)
    in_tiles = dtype is torch.bfloat16 and request.node.callspec.params["kernels"].name == "amx"
    atol = 2**-8 * float(story.v.abs().max()) if in_tiles else 2e-6
    torch.testing.assert_close(whole, want, rtol=0, atol=atol)
    torch.set_num_threads(1)
    for cut in ([511, 512, 513, 600], [100, 256, 257, 590, 600]):
        pieces = [story.attend(kernels, a, b) for a, b in zip([0, *cut], cut, strict=False)]
        assert torch.equal(torch.cat(pieces), whole)
    torch.set_num_threads(2)
    for last in (1, 255, 256, 257, 600):
        assert torch.equal(story.attend(kernels, last - 1, last)[0], whole[last - 1])


def test_keys_with_outliers_stay_as_exact_as_fp32_allows(kernels: dict[str, Kernel]) -> None:
    """Keys of the first Qwen2 models have channels around a thousand."""
    story = Story(300, 7, 1, 64, seed=8)
    story.k[..., 5] += 1000
    story.fill(kernels)
    got = story.attend(kernels, 299, 300)[0].double()
    products = story.k[:, 0].double() @ story.q[299].double().T / 8  # [keys, heads]
    want = torch.softmax(products, 0).T @ story.v[:, 0].double()  # [heads, head_dim]
    size = (story.k[:, 0].double().abs() @ story.q[299].double().abs().T / 8).amax(0)  # [heads]
    assert ((got - want).abs().amax(1) <= size * 2**-23 * 8).all()


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
def test_a_bf16_cache_rounds_queries_and_weights_and_nothing_else(
    kernels: dict[str, Kernel], sharpness: float
) -> None:
    """Rounded weights that add up to one: constant values come out as they are, others within
    2^-9 of their distances from the result.
    """
    story = Story(700, 7, 1, 64, seed=10, dtype=torch.bfloat16)
    story.q *= sharpness
    story.k[..., 5] += 100
    story.v[..., :8] = 3.25
    story.fill(kernels)
    got = story.attend(kernels, 699, 700)[0].double()
    q, k, v = (t.bfloat16().double() for t in (story.q[699], story.k[:, 0], story.v[:, 0]))
    weights = torch.softmax(k @ q.T / 8, 0)  # [keys, heads]
    want = weights.T @ v  # [heads, head_dim]
    distances = torch.stack([w @ (v - row).abs() for w, row in zip(weights.T, want, strict=True)])
    slack = 2**-23 * 8 * float((k.abs() @ q.abs().T / 8).max()) * float(v.abs().max())
    assert ((got - want).abs() <= 2**-9 * 1.05 * distances + slack).all()
    torch.testing.assert_close(got[:, :8], torch.full_like(got[:, :8], 3.25), rtol=1e-6, atol=0)


def test_blocks_before_the_window_are_not_read(kernels: dict[str, Kernel]) -> None:
    story = Story(300, 6, 2, 64, seed=9, window=20)
    story.fill(kernels)
    want = story.attend(kernels, 290, 300)
    story.keys[story.table[:16]] = torch.nan
    story.values[story.table[:16]] = torch.nan
    story.table[:16] = -1
    assert torch.equal(story.attend(kernels, 290, 300), want)


@_every_shape
def test_a_sequence_has_the_same_result_beside_others(
    kernels: dict[str, Kernel], heads: int, kv_heads: int, head_dim: int
) -> None:
    plan = [(70, 70), (1, 300), (5, 33), (1, 1), (17, 96)]  # queries and keys of each sequence
    stories = [Story(n, heads, kv_heads, head_dim, seed=i) for i, (_, n) in enumerate(plan)]
    keys, values, tables, offset = [], [], torch.zeros(len(plan), 19, dtype=torch.int64), 0
    for row, story in zip(tables, stories, strict=True):
        story.fill(kernels)
        row[: story.count] = story.table + offset
        keys.append(story.keys)
        values.append(story.values)
        offset += len(story.keys)
    chunks = [s.q[n - m :] for s, (m, n) in zip(stories, plan, strict=True)]
    lengths = torch.tensor(plan)
    together = kernels["paged_attention"](
        torch.cat(chunks),
        torch.cat(keys),
        torch.cat(values),
        tables,
        lengths[:, 0],
        lengths[:, 1],
        head_dim**-0.5,
    )
    alone = [s.attend(kernels, n - m, n) for s, (m, n) in zip(stories, plan, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_long_sequences_stay_near_the_reference(kernels: dict[str, Kernel]) -> None:
    story = Story(1500, 6, 2, 64, seed=3)
    story.fill(kernels)
    got = story.attend(kernels, 1400, 1500)
    want = story.attend({"paged_attention": paged_attention.reference}, 1400, 1500)
    assert (got - want).abs().max() < 1e-6


def test_queries_may_be_part_of_something_wider(kernels: dict[str, Kernel]) -> None:
    story = Story(20, 6, 2, 64, seed=4)
    story.fill(kernels)
    want = story.attend(kernels, 0, 20)
    story.q = torch.cat((story.k, story.q, story.v), 1)[:, 2:8]
    assert not story.q.is_contiguous()
    assert torch.equal(story.attend(kernels, 0, 20), want)


def test_a_broken_query_shows(kernels: dict[str, Kernel]) -> None:
    story = Story(20, 6, 2, 64, seed=5)
    story.fill(kernels)
    story.q[19, 3, 7] = torch.nan
    got = story.attend(kernels, 0, 20)
    assert got[19, 3].isnan().all()
    got[19, 3] = 0
    assert not got.isnan().any()


def test_addresses_outside_the_cache_are_refused(kernels: dict[str, Kernel]) -> None:
    story = Story(20, 6, 2, 64, seed=6)
    story.fill(kernels)
    for wrong in (-1, len(story.keys)):
        story.table[1] = wrong
        with pytest.raises(KernelError, match="block table"):
            story.attend(kernels, 0, 20)
        slots = torch.tensor([0, wrong * BLOCK_TOKENS])
        before, caches = story.keys.clone(), (story.keys, story.values)
        with pytest.raises(KernelError, match="kv_write: slots"):
            kernels["kv_write"](story.k[:2], story.v[:2], *caches, slots)
        tables = torch.ones(2, 32)
        with pytest.raises(KernelError, match="rotary_kv_write: slots"):
            kernels["rotary_kv_write"](
                story.q[:2], story.k[:2], story.v[:2], tables, tables, *caches, slots
            )
        assert torch.equal(story.keys.nan_to_num(), before.nan_to_num())


def test_lengths_that_do_not_fit_are_refused(kernels: dict[str, Kernel]) -> None:
    story = Story(20, 6, 2, 64, seed=7)
    story.fill(kernels)
    table = story.table[None]
    run = kernels["paged_attention"]
    for queries, keys in ((19, 20), (20, 19), (20, 33), (0, 20)):
        lengths = torch.tensor([queries]), torch.tensor([keys])
        with pytest.raises(KernelError, match="lengths"):
            run(story.q, story.keys, story.values, table, *lengths, 0.125)
    lengths = torch.tensor([20]), torch.tensor([20])
    with pytest.raises(KernelError, match=r"q \[20, 5, 64\]"):
        run(story.q[:, :5], story.keys, story.values, table, *lengths, 0.125)
    with pytest.raises(KernelError, match="int32"):
        run(story.q, story.keys, story.values, table.int(), *lengths, 0.125)
    with pytest.raises(KernelError, match=r"values \[4, 16, 1, 64\]"):
        run(story.q, story.keys, story.values[:, :, :1], table, *lengths, 0.125)
    slots = torch.arange(2)
    with pytest.raises(KernelError, match=r"v \[2, 1, 64\]"):
        kernels["kv_write"](story.k[:2], story.v[:2, :1], story.keys, story.values, slots)
    together, caches = kernels["rotary_kv_write"], (story.keys, story.values)
    rows, table = (story.q[:2], story.k[:2], story.v[:2]), torch.ones(2, 32)
    with pytest.raises(KernelError, match=r"sin \[2, 31\]"):
        together(*rows, table, table[:, :31], *caches, slots)
    with pytest.raises(KernelError, match=r"k \[2, 1, 64\]"):
        together(story.q[:2], *(t[:, :1] for t in rows[1:]), table, table, *caches, slots)
    with pytest.raises(KernelError, match=r"factors \[3\]"):
        together(*rows, table, table, *caches, slots, None, None, torch.ones(3))
