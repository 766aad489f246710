"""What the native products with packed matrices promise beyond the contract of their op: how far
activations are rounded, the same bits in any batch, chain and number of threads, and where numbers
that are not finite go. In every variant that this machine runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import bind, cpu_features
from qwenkit.kernels.cpu.library import Kernel, open_library
from qwenkit.kernels.ops.packed_matmul import Setting
from qwenkit.kernels.packed import KINDS, Packed, unpack

# Name, what it is, columns.
MATRICES = {
    "int4 32": (Setting("int4", 32), 224),
    "int4 64": (Setting("int4", 64), 192),
    "int4 128": (Setting("int4", 128), 384),
    "int4 32 mins": (Setting("int4", 32, "mins"), 224),
    "int4 128 zeros": (Setting("int4", 128, "zeros"), 384),
    "int4 256 wide zeros": (Setting("int4", 256, "zeros", wide=True), 512),
    "nf4 64": (Setting("nf4", 64, wide=True), 192),
    "fp4 128": (Setting("fp4", 128), 384),
    "iq4_nl 32": (Setting("iq4_nl", 32), 224),
    "int8 32": (Setting("int8", 32), 96),
    "int8 128": (Setting("int8", 128), 256),
    "int8 row zeros": (Setting("int8", 0, "zeros"), 160),
    "llm_int8 row": (Setting("llm_int8", wide=True), 192),
    "fp8 128": (Setting("fp8", 128, wide=True), 256),
    "fp8 row": (Setting("fp8", wide=True), 100),
    "bf16": (Setting("bf16"), 102),
    "fp32": (Setting("fp32"), 101),
}
WHOLE = [name for name, (s, _) in MATRICES.items() if KINDS[s.kind].form in ("int4", "int8")]
FLOATS = [name for name in MATRICES if name not in WHOLE]
# Root mean squares of its token: a group with more is rounded twice, by whether it must be precise.
OUTLIER = {False: 5.0, True: 3.0}
_names = pytest.mark.parametrize("name", MATRICES)
_whole = pytest.mark.parametrize("name", WHOLE)
_precise = pytest.mark.parametrize("precise", [False, True], ids=["plain", "precise"])


@cache
def _library(variant: build.Variant) -> ctypes.CDLL:
    try:
        if not variant.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {variant.name}")
        return open_library(build.build_variant(variant))
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(params=[pytest.param(v, id=v.name) for v in build.VARIANTS])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return _library(request.param)


@pytest.fixture
def run(library: ctypes.CDLL) -> Kernel:
    return bind(library)["packed_matmul"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(name: str, rows: int = 50, seed: int = 0) -> Packed:
    setting, columns = MATRICES[name]
    return setting.matrix(rows, columns, torch.Generator().manual_seed(seed))


def native_numbers(packed: Packed) -> torch.Tensor:
    """The numbers as products have them, fp64: levels are the nearest of whole units."""
    kind = KINDS[packed.kind]
    if kind.levels is None or kind.steps is None:
        return unpack(packed, torch.float32).double()
    levels, steps = torch.tensor(kind.levels), torch.tensor(kind.steps) * kind.unit
    flat = replace(packed, scales=torch.ones_like(packed.scales))  # type: ignore[arg-type]
    places = (unpack(flat, torch.float32)[:, :, None] - levels).abs().argmin(2)
    scales = unpack(
        replace(packed, data=torch.full_like(packed.data, _largest(packed))), torch.float32
    )
    return steps.double()[places] * (scales / kind.levels[_largest(packed) & 15]).double()


def _largest(packed: Packed) -> int:
    """A byte of two places of the level of largest magnitude."""
    levels = KINDS[packed.kind].levels or ()
    place = max(range(16), key=lambda i: abs(levels[i]))
    return place | place << 4


def token_group(packed: Packed) -> int:
    """Columns by which tokens are rounded."""
    return next(size for size in (128, 64, 32) if packed.group % size == 0)


def numbers(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Most of the size of one, a few a hundred times that, as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, torch.randint(0, columns, (2,), generator=generator)] *= 100
    return x


def multiply(
    run: Kernel,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    precise: bool = False,
) -> torch.Tensor:
    tensors = packed.data, packed.scales, packed.mins, bias, residual
    y: torch.Tensor = run(x, *tensors, packed.kind, packed.rows, packed.zero_point, precise)
    return y


def lists(matrices: list[Packed]) -> tuple[list[torch.Tensor], ...]:
    """Data, scales and minimums as ops of several matrices take them."""
    return (
        [m.data for m in matrices],
        [m.scales for m in matrices if m.scales is not None],
        [m.mins for m in matrices if m.mins is not None],
    )


def project(
    run: Kernel,
    x: torch.Tensor,
    matrices: list[Packed],
    biases: list[torch.Tensor],
    precise: list[bool],
    norm: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    how = matrices[0].kind, [m.rows for m in matrices], matrices[0].zero_point, precise
    results: list[torch.Tensor] = run(x, norm, 1e-6, *lists(matrices), biases, *how)
    return results


def rounded(x: torch.Tensor, group: int, *, precise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, columns] as the kernels round it for whole numbers: by groups of columns to
    amax / 127; what is left once more where the group stands out of its token.
    And the most by which a number of each group may then be off: [tokens, groups].
    """
    grouped = x.view(len(x), -1, group)
    rms = x.double().square().mean(1).sqrt()[:, None, None]
    amax = grouped.abs().amax(2, keepdim=True)
    twice = amax > OUTLIER[precise] * rms

    def nearest(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(2, keepdim=True) / 127
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return (values * inverse).round() * scale.double()

    first = nearest(grouped)
    rest = nearest((grouped.double() - first).float())
    most = amax.double() / torch.where(twice, 127 * 508, 254)
    return torch.where(twice, first + rest, first).flatten(1), most[:, :, 0]


@_precise
@_whole
def test_activations_are_rounded_so_far_and_no_further(
    run: Kernel, name: str, precise: bool
) -> None:
    packed = matrix(name)
    weight, group = native_numbers(packed), token_group(packed)
    sums = weight.abs().view(50, -1, group).sum(2)  # [rows, groups]
    bias, residual = numbers(1, 50, 2)[0], numbers(20, 50, 3)
    calm = torch.randn(20, packed.columns, generator=torch.Generator().manual_seed(5))
    for x in (numbers(20, packed.columns), calm, calm * 1e-20, calm * 1e12):
        expected, most = rounded(x, group, precise=precise)
        size = x.double().abs() @ weight.abs().T
        got = multiply(run, x, packed, precise=precise).double()
        # Near a tie of the second rounding the last bit of an fp32 number decides.
        close = 1e-5 if precise else 1e-6
        assert ((got - expected @ weight.T).abs() / size).max() < close
        off = (got - x.double() @ weight.T).abs()
        assert (off <= 1.001 * most @ sums.T + 1e-6 * size).all()
    got = multiply(run, calm, packed, bias, residual, precise=precise)
    alone = multiply(run, calm, packed, precise=precise)
    assert torch.equal(got, alone + bias + residual)


@pytest.mark.parametrize("name", [n for n in MATRICES if MATRICES[n][0].kind in ("nf4", "fp4")])
def test_levels_are_near_to_what_they_stand_for(name: str) -> None:
    packed = matrix(name)
    exact, scale = unpack(packed, torch.float32).double(), 0.04
    off = native_numbers(packed) - exact
    assert off.abs().max() < 0.004 * scale
    assert off.square().mean().sqrt() < 0.0018 * scale


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_products_are_close(run: Kernel, name: str) -> None:
    packed = matrix(name)
    weight = unpack(packed, torch.float32).double()
    x = numbers(20, packed.columns)
    size = x.double().abs() @ weight.abs().T
    error = ((multiply(run, x, packed).double() - x.double() @ weight.T).abs() / size).max()
    assert error < (2**-8 if name == "bf16" else 1e-6)


@_precise
@_names
def test_a_token_has_the_same_bits_in_any_batch(run: Kernel, name: str, precise: bool) -> None:
    packed = matrix(name)
    x = numbers(40, packed.columns)
    bias, residual = numbers(1, 50, 2)[0], numbers(40, 50, 3)
    torch.set_num_threads(1)
    alone = torch.cat(
        [
            multiply(run, x[i : i + 1], packed, bias, residual[i : i + 1], precise=precise)
            for i in range(40)
        ]
    )
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for tokens in range(1, 41) if count == 1 else (1, 2, 7, 15, 16, 40):
            rows = slice(40 - tokens, 40)
            got = multiply(run, x[rows], packed, bias, residual[rows], precise=precise)
            assert torch.equal(got, alone[rows]), (count, tokens)


@_whole
def test_many_tokens_have_the_bits_of_few(run: Kernel, name: str) -> None:
    """From 64 on, numbers of four bits are taken apart first."""
    packed = matrix(name)
    x = numbers(70, packed.columns)
    few = torch.cat([multiply(run, x[at : at + 14], packed) for at in range(0, 70, 14)])
    assert torch.equal(multiply(run, x, packed), few)


@_names
def test_a_row_of_the_matrix_has_the_same_bits_among_any_others(run: Kernel, name: str) -> None:
    torch.set_num_threads(3)
    packed = matrix(name, rows=130)
    x = numbers(19, packed.columns)
    for tokens in (1, 5, 19):
        whole = multiply(run, x[:tokens], packed)
        for panels, rows in ((1, 1), (1, 15), (2, 32), (3, 33), (5, 80), (9, 130)):
            few = replace(
                packed,
                rows=rows,
                data=packed.data[:panels],
                scales=None if packed.scales is None else packed.scales[:panels],
                mins=None if packed.mins is None else packed.mins[:panels],
            )
            assert torch.equal(multiply(run, x[:tokens], few), whole[:, :rows])


@_names
def test_matrices_of_one_call_give_the_bits_of_each(library: ctypes.CDLL, name: str) -> None:
    kernels = bind(library)
    matrices = [matrix(name, rows, seed) for seed, rows in enumerate((33, 16, 100, 5))]
    precise = [False, True, False, True]
    biases = [numbers(1, packed.rows, seed)[0] for seed, packed in enumerate(matrices)]
    norm = torch.rand(matrices[0].columns)
    x = numbers(47, matrices[0].columns)
    for tokens, count in ((1, 1), (1, 3), (7, 2), (17, 1), (47, 3)):
        torch.set_num_threads(count)
        results = project(kernels["packed_projections"], x[:tokens], matrices, biases, precise)
        normal = kernels["rms_norm"](x[:tokens], norm, 1e-6)
        after = project(kernels["packed_projections"], x[:tokens], matrices, [], precise, norm)
        for i, packed in enumerate(matrices):
            given = packed, biases[i]
            alone = multiply(kernels["packed_matmul"], x[:tokens], *given, precise=precise[i])
            assert torch.equal(results[i], alone)
            alone = multiply(kernels["packed_matmul"], normal, packed, precise=precise[i])
            assert torch.equal(after[i], alone)


@_names
def test_a_gated_product_gives_the_bits_of_its_steps(library: ctypes.CDLL, name: str) -> None:
    kernels = bind(library)
    for rows in (16, 50):
        both = [matrix(name, rows, seed) for seed in (1, 2)]
        x, norm = numbers(40, both[0].columns), torch.rand(both[0].columns)
        for tokens in (1, 5, 6, 17, 40):
            normal = kernels["rms_norm"](x[:tokens], norm, 1e-6)
            gate, up = (multiply(kernels["packed_matmul"], normal, packed) for packed in both)
            how = both[0].kind, rows, both[0].zero_point
            got = kernels["packed_gated"](x[:tokens], norm, 1e-6, *lists(both), *how)
            assert torch.equal(got, kernels["silu_mul"](gate, up))


@_precise
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@_names
def test_what_is_not_finite_is_seen_in_its_own_row_only(
    run: Kernel, name: str, bad: float, precise: bool
) -> None:
    packed = matrix(name)
    for tokens, hit in ((1, 0), (9, 4), (20, 19)):
        x = numbers(tokens, packed.columns)
        clean = multiply(run, x, packed, precise=precise)
        x[hit, packed.columns // 2] = bad
        got = multiply(run, x, packed, precise=precise)
        others = torch.arange(tokens) != hit
        assert torch.equal(got[others], clean[others])
        seen = got[hit].isnan() if name in WHOLE else ~got[hit].isfinite()
        assert seen.all()


@_precise
@_names
def test_zeros_and_numbers_that_are_nearly_none(run: Kernel, name: str, precise: bool) -> None:
    packed = matrix(name)
    x = numbers(5, packed.columns)
    bias = numbers(1, 50, 2)[0]
    zeros = torch.zeros_like(x)
    assert torch.equal(multiply(run, zeros, packed, precise=precise), torch.zeros(5, 50))
    assert torch.equal(multiply(run, -zeros, packed, bias, precise=precise), bias.expand(5, 50))
    tiny = multiply(run, x * 1e-42, packed, precise=precise)
    assert (tiny.abs() < 1e-30).all()
    lonely = zeros.clone()
    lonely[2, 7] = 3.0
    got = multiply(run, lonely, packed, precise=precise)
    want = 3 * native_numbers(packed)[:, 7].float()
    torch.testing.assert_close(got[2], want, rtol=1e-6, atol=2e-9)
    assert not got[[0, 1, 3, 4]].any()
    mixed = x.clone()
    mixed[:, ::2] = 1e-42
    exact = mixed.double() @ unpack(packed, torch.float32).double().T
    size = mixed.double().abs() @ unpack(packed, torch.float32).double().abs().T
    got = multiply(run, mixed, packed, precise=precise)
    assert ((got - exact).abs() / size).max() < 2e-2


@pytest.mark.parametrize(("kind", "columns"), [("int4", 48), ("int8", 40), ("bf16", 7)])
def test_columns_that_are_no_multiple_are_refused(run: Kernel, kind: str, columns: int) -> None:
    packed = matrix({"int4": "int4 32", "int8": "int8 32", "bf16": "bf16"}[kind])
    with pytest.raises(KernelError, match=f"packed {kind} matrix of 50 × {columns}"):
        multiply(run, torch.zeros(2, columns), packed)


@_names
def test_what_lies_oddly_in_memory_is_read_right(run: Kernel, name: str) -> None:
    packed = matrix(name)
    x = numbers(6, packed.columns)
    want = multiply(run, x, packed)
    spread = torch.stack([x, x], 2)[:, :, 0]
    assert not spread.is_contiguous()
    assert torch.equal(multiply(run, spread, packed), want)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(multiply(run, shifted, packed), want)
    half = multiply(run, x.bfloat16(), packed)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, multiply(run, x.bfloat16().float(), packed).bfloat16())
