"""What rounding may come to by chance: large where few tokens were seen, and no more than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantized_made import EXPERTS, write_quantized
from qwenkit.quantize.grid import Grid, round_to_nearest
from qwenkit.quantize.judge import measure
from qwenkit.quantize.pairs import Pair, make_pair
from qwenkit.quantize.report import Limits
from qwenkit.quantize.settings import QuantizeSettings

LOOSE = Limits(perplexity_rise=1e6, kl=1e6)
ROWS, COLUMNS = 20_000, 64


def _pair(grid: Grid, inputs: torch.Tensor, *, bad_row: int | None = None) -> Pair:
    parent = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    own = round_to_nearest(parent, grid).dequantize()
    if bad_row is not None:
        own[bad_row] *= 8  # a bad scale
    pair = make_pair(parent, own, (None, None), grid, torch.ones(COLUMNS), None)
    pair.add(inputs)
    return pair


def _inputs(tokens: int, directions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(tokens, directions, generator=generator)
    return first @ torch.randn(directions, COLUMNS, generator=generator)


@pytest.mark.parametrize("grid", [Grid(3, 64, True), Grid(4, 32, False), Grid(4, -1, True)])
@pytest.mark.parametrize(("tokens", "directions"), [(1, 64), (500, 1), (3, 64), (500, 64)])
def test_rounding_to_nearest_is_its_own_measure(grid: Grid, tokens: int, directions: int) -> None:
    pair = _pair(grid, _inputs(tokens, directions))
    worst, chance = pair.worst_row(), pair.by_chance()
    assert worst is not None
    assert chance is not None
    assert pair.beside_rounding == pytest.approx(1.0, abs=0.1)
    assert worst[1] < chance[1]
    assert chance[0] < 1.3  # many rows, each rounded for itself
    if tokens == 1 or directions == 1:
        assert worst[1] > 3.5  # what a limit without chance takes for a fault
        assert chance[1] == pytest.approx(7.5, abs=0.1)
    else:
        assert chance[1] < (6 if tokens == 3 else 4)  # the limit without it


@pytest.mark.parametrize("tokens", [1, 3, 500])
def test_a_bad_scale_is_more_than_chance(tokens: int) -> None:
    pair = _pair(Grid(4, 64, True), _inputs(tokens, 64), bad_row=77)
    worst, chance = pair.worst_row(), pair.by_chance()
    assert worst is not None
    assert chance is not None
    assert worst[0] == 77
    assert worst[1] > 1.5 * max(4.0, chance[1])


def test_one_row_is_a_matrix_that_hangs_on_chance() -> None:
    parent = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(1))
    pair = make_pair(parent, parent, (None, None), Grid(4, -1, True), torch.ones(COLUMNS), None)
    pair.add(_inputs(1, 64))
    assert pair.by_chance() == pytest.approx((7.5, 7.5), abs=0.1)
    plain = make_pair(parent, parent, (None, None), None, torch.ones(COLUMNS), None)
    plain.add(_inputs(1, 64))
    assert plain.by_chance() is None


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("size", [32, -1])
def test_experts_that_few_tokens_chose_are_not_refused(
    tmp_path: Path, method: str, size: int
) -> None:
    settings = QuantizeSettings(method=method, group_size=size)
    source, path, rows = write_quantized(tmp_path, settings, config=EXPERTS)
    with torch.inference_mode():
        for few in (2, 5):
            judging = (rows.judging[0][:few],)
            sheet = measure(source, path, judging, "", limits=LOOSE, name="few")
            assert sheet.refusals() == []
    experts = [m for m in sheet.to_json()["matrices"] if ".experts." in m["path"]]
    assert max(m["row_by_chance"] for m in experts) > 5  # of one or two tokens
    json.dumps(sheet.to_json(), allow_nan=False)
