"""The numbers that GPTQ and AWQ choose: against a slow reference, and against rounding."""

from __future__ import annotations

import pytest
import torch

from qwenkit.errors import NonFiniteError
from qwenkit.quantize import awq, ranges
from qwenkit.quantize.awq import search_scales
from qwenkit.quantize.gptq import gptq
from qwenkit.quantize.grid import (
    Grid,
    Rounded,
    find_grid,
    group_index,
    round_to,
    round_to_nearest,
)
from qwenkit.quantize.hessian import FeedSums, Hessian
from qwenkit.quantize.layer import output_error
from qwenkit.quantize.ranges import Ranges, round_clipped

ROWS, COLUMNS, SIZE, BITS = 24, 256, 64, 3
GRID = Grid(BITS, SIZE, symmetric=True)


def _inputs(tokens: int = 600, seed: int = 0, columns: int = COLUMNS) -> torch.Tensor:
    """Inputs that vary together, some channels much larger, as those of trained models do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns // 8, columns, generator=torch.Generator().manual_seed(9))
    x = torch.randn(tokens, columns // 8, generator=generator) @ mixed
    x = x + 0.5 * torch.randn(tokens, columns, generator=generator)
    x[:, ::37] *= 12
    return x


def _weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05


def _sums(x: torch.Tensor) -> Hessian:
    sums = Hessian(x.shape[1])
    for part in x.split(97):
        sums.add(part)
    return sums


def _error(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (other - weight).T).norm() / (x @ weight.T).norm())


def _slowly(weight: torch.Tensor, hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """GPTQ by its definition: after each column the inverse is that of the columns left."""
    left, found = weight.double().clone(), torch.zeros_like(weight)
    damped = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    for column in range(weight.shape[1]):
        if column % SIZE == 0:
            scales, zeros = find_grid(left[:, column : column + SIZE].float(), GRID)
        now = left[:, column].float()
        level = round_to(now, scales, zeros, GRID)
        found[:, column] = (level - zeros) * scales
        off = (left[:, column] - found[:, column].double()) / inverse[column, column]
        left[:, column:] -= off[:, None] * inverse[column, column:]
        inverse = (
            inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
        )
    return found


def test_sums_are_those_of_the_rows() -> None:
    x = _inputs(columns=1500)
    sums, exact = _sums(x), (x.double().T @ x.double()).float()
    near = {"rtol": 0.0, "atol": 1e-6 * float(exact.abs().max())}
    assert torch.allclose(sums.matrix(), exact, **near)
    assert torch.equal(sums.matrix(), sums.matrix().T)
    assert torch.allclose(sums.mean_absolute, x.abs().mean(0), rtol=1e-5)
    sums.scale_inputs(torch.full((1500,), 2.0))
    assert torch.allclose(sums.matrix(), exact / 4, **near)
    assert torch.allclose(sums.mean_absolute, x.abs().mean(0) / 2, rtol=1e-5)


def test_columns_are_rounded_as_by_the_definition() -> None:
    weight, hessian = _weight(), _sums(_inputs()).matrix()
    ours = gptq(weight, hessian, GRID, act_order=False, damp=0.01)
    slow = _slowly(weight, hessian, 0.01)
    same = (ours.rounded.dequantize() == slow).float().mean()
    assert same > 0.99  # where two levels are equally near, the last bit decides
    assert output_error(weight, slow, hessian) == pytest.approx(
        output_error(weight, ours.rounded.dequantize(), hessian), rel=0.01
    )
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    off = weight - ours.rounded.dequantize()
    assert ours.error == pytest.approx(float(((off @ damped) * off).sum()), rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_gptq_is_nearer_than_rounding(act_order: bool, symmetric: bool, size: int) -> None:
    weight, seen, other = _weight(), _inputs(seed=2), _inputs(seed=3)
    grid = Grid(BITS, size, symmetric)
    plain = round_to_nearest(weight, grid)
    found = gptq(weight, _sums(seen).matrix(), grid, act_order=act_order, damp=0.01).rounded
    assert _error(weight, found.dequantize(), other) < 0.6 * _error(
        weight, plain.dequantize(), other
    )
    groups = 1 if size == -1 else COLUMNS // size
    assert found.groups.bincount().tolist() == [COLUMNS // groups] * groups
    in_order = bool((found.groups.diff() >= 0).all())
    assert in_order == (size == -1 or not act_order)


def test_act_order_puts_the_largest_channels_into_the_first_group() -> None:
    x = _inputs()
    grid = Grid(BITS, 32, symmetric=True)
    found = gptq(_weight(), _sums(x).matrix(), grid, act_order=True, damp=0.01).rounded
    assert found.groups[::37].tolist() == [0] * len(found.groups[::37])


def test_a_column_that_nothing_reached_is_rounded_to_nearest() -> None:
    x = _inputs()
    x[:, 5] = 0
    weight = _weight()
    grid = Grid(4, -1, symmetric=True)
    found = gptq(weight, _sums(x).matrix(), grid, act_order=False, damp=0.01).rounded
    step = found.scales[:, 0]
    assert bool(((found.dequantize()[:, 5] - weight[:, 5]).abs() <= step / 2 + 1e-6).all())


def test_a_matrix_of_one_direction_is_damped_until_it_can_be_factored() -> None:
    x = torch.ones(40, 1) @ torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 1e4
    grid = Grid(4, 32, symmetric=True)
    found = gptq(_weight(8, 64), _sums(x).matrix(), grid, act_order=False, damp=1e-12)
    assert found.damp > 1e-12
    assert bool(torch.isfinite(found.rounded.dequantize()).all())


def test_awq_scales_channels_that_carry_much() -> None:
    weight, x, other = _weight(), _inputs(seed=2), _inputs(seed=3)
    sums, grid = _sums(x), Grid(BITS, SIZE, symmetric=False)
    scales = search_scales([weight], sums.mean_absolute, sums.matrix(), grid)
    assert float(scales[::37].mean()) > 1.5 * float(scales.mean())
    sums.scale_inputs(scales)
    plain = round_to_nearest(weight, grid).dequantize()
    errors = [_error(weight, plain, other)]
    for found in (
        round_to_nearest(weight * scales, grid),
        round_clipped(weight * scales, sums.matrix(), grid),
    ):
        errors.append(_error(weight, found.dequantize() / scales, other))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.95 * errors[1]


def _clipped_error(weight: torch.Tensor, scales: torch.Tensor, sums: torch.Tensor) -> float:
    """What scaled and clipped rounding loses of the outputs."""
    seen = sums / scales / scales[:, None]
    found = round_clipped(weight * scales, seen, Grid(BITS, SIZE, symmetric=False))
    return output_error(weight, found.dequantize() / scales, sums)


@pytest.mark.parametrize("cut", [False, True])
def test_scales_lose_less_than_none_and_than_plain_powers(
    cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = _sums(_inputs(seed=2))
    sizes = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(5)).mul(0.7).exp()
    weight = _weight(600) * sizes
    grid, hessian = Grid(BITS, SIZE, symmetric=False), sums.matrix()
    if cut:  # 128 of the rows stand for all
        monkeypatch.setattr(awq, "_SEARCH_NUMBERS", 1)
    scales = search_scales([weight[:300], weight[300:]], sums.mean_absolute, hessian, grid)
    found = _clipped_error(weight, scales, hessian)
    assert found < 0.9 * _clipped_error(weight, torch.ones(COLUMNS), hessian)
    for ratio in (0.25, 0.5, 0.75, 1.0):
        plain = sums.mean_absolute**ratio
        assert found < 0.97 * _clipped_error(weight, plain / plain.mean(), hessian)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, -1])
def test_ranges_that_know_of_each_other_lose_less(symmetric: bool, size: int) -> None:
    weight, sums = _weight(), _sums(_inputs(seed=2)).matrix()
    grid = Grid(BITS, size, symmetric)
    alone = Ranges(weight, sums, grid)
    alone.narrow()
    numbers = alone.numbers.transpose(0, 1).flatten(1)
    kept = Rounded(
        numbers, alone.scales.T, alone.zeros.T, group_index(COLUMNS, grid.columns_of(weight)), BITS
    ).dequantize()
    found = round_clipped(weight, sums, grid)
    plain = round_to_nearest(weight, grid).dequantize()
    errors = [output_error(weight, w, sums) for w in (plain, kept, found.dequantize())]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] <= errors[1] if size == -1 else errors[2] < 0.9 * errors[1]
    other = _inputs(seed=3)
    assert _error(weight, found.dequantize(), other) < _error(weight, plain, other)


def test_rows_are_rounded_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, sums = _weight(), _sums(_inputs()).matrix()
    whole = round_clipped(weight, sums, GRID).dequantize()
    monkeypatch.setattr(ranges, "_ROWS_AT_ONCE", 7)
    assert output_error(whole, round_clipped(weight, sums, GRID).dequantize(), None) < 0.01


def test_channels_and_columns_of_nothing_are_not_scaled_away() -> None:
    x, weight = _inputs(), _weight()
    x[:, 5], weight[:, 9] = 0, 0
    sums, grid = _sums(x), Grid(BITS, SIZE, symmetric=False)
    scales = search_scales([weight], sums.mean_absolute, sums.matrix(), grid)
    assert bool(torch.isfinite(scales).all())
    assert 0.02 < float(scales.min()) < float(scales.max()) < 50
    weight[:, :SIZE] = 0  # a whole group
    scales = search_scales([weight], sums.mean_absolute, sums.matrix(), grid)
    assert bool(torch.isfinite(scales).all())
    assert 0.02 < float(scales.min()) < float(scales.max()) < 50


def test_awq_leaves_alone_what_scaling_does_not_help() -> None:
    weight = torch.ones(4, 64)
    sums = _sums(torch.ones(8, 64))
    grid = Grid(4, 32, symmetric=False)
    scales = search_scales([weight], sums.mean_absolute, sums.matrix(), grid)
    assert torch.equal(scales, torch.ones(64))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_reaches_the_extremes(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.0, -1.0):
        numbers = torch.randn(50, 32, generator=generator) * 0.1 + shift
        grid = Grid(4, 32, symmetric)
        scales, zeros = find_grid(numbers, grid)
        levels = round_to(numbers, scales[:, None], zeros[:, None], grid)
        off = ((levels - zeros[:, None]) * scales[:, None] - numbers).abs()
        # the most positive number of a symmetric grid is half a step beyond its last level
        assert bool((off <= scales[:, None] * (0.5 + 0.02)).all())
        assert torch.equal(scales, scales.half().float())


def test_a_group_of_zeros_stays_zero() -> None:
    numbers = torch.zeros(2, 32)
    numbers[1] = 1e-9
    found = round_to_nearest(numbers, Grid(4, 32, symmetric=True))
    assert not found.dequantize()[0].any()
    assert bool((found.scales > 0).all())


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="too large for a scale"):
        round_to_nearest(torch.full((1, 32), 1e6), Grid(4, 32, symmetric=True))


def test_experts_that_few_tokens_chose_are_fitted_to_others_too() -> None:
    sums = FeedSums(32, 3, alike=True)
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    sums.take(x, torch.tensor([60, 70, 70]))
    whole, note = sums.matrix(0)
    assert note is None
    assert whole is not None
    assert torch.allclose(whole, x[:60].T @ x[:60], atol=1e-3)
    few, note = sums.matrix(1)
    assert note is not None
    assert "10 tokens chose this expert" in note
    assert few is not None
    expected = x[60:].T @ x[60:] + 22 / 70 * (x.T @ x)
    assert torch.allclose(few, expected, atol=1e-3)
    assert sums.matrix(2) == (None, "no token chose this expert: rounded to nearest")
    apart = FeedSums(32, 2, alike=False)
    apart.take(x, torch.tensor([60, 70]))
    few, _ = apart.matrix(1)
    assert few is not None
    expected = x[60:].T @ x[60:] + torch.diag(22 / 70 * x.square().sum(0))
    assert torch.allclose(few, expected, atol=1e-3)
