"""The native calls of a mixture: the same bits as its experts one by one, and nothing outside."""

from __future__ import annotations

import pytest
import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features, load_kernels
from qwenkit.kernels.cpu.library import Kernel
from qwenkit.kernels.ops.packed_matmul import Setting
from qwenkit.kernels.packed import PANEL_ROWS, Packed

EXPERTS, ROWS, COLUMNS = 7, 48, 256


@pytest.fixture(params=[pytest.param(v, id=v.name) for v in build.VARIANTS])
def kernels(request: pytest.FixtureRequest) -> dict[str, Kernel]:
    try:
        if not request.param.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {request.param.name}")
        return load_kernels(build.build_variant(request.param))
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


def matrices(kind: str, group: int) -> list[Packed]:
    generator = torch.Generator().manual_seed(0)
    return [Setting(kind, group).matrix(EXPERTS * ROWS, COLUMNS, generator) for _ in range(2)]


def lists(packed: list[Packed], panels: slice = slice(None)) -> list[list[torch.Tensor]]:
    """Data, scales and minimums of some panels, as ops of several matrices take them."""
    kinds = zip(*((m.data, m.scales, m.mins) for m in packed), strict=True)
    return [[t[panels] for t in tensors if t is not None] for tensors in kinds]


@pytest.mark.parametrize(
    ("kind", "group"),
    [("int4", 32), ("int4", 128), ("int8", 64), ("nf4", 64), ("fp8", 128), ("bf16", 0)],
)
@pytest.mark.parametrize("tokens", [1, 9, 80])
def test_all_experts_at_once_give_the_bits_of_each(
    kernels: dict[str, Kernel], kind: str, group: int, tokens: int
) -> None:
    both = matrices(kind, group)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, COLUMNS, generator=generator)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    _, _, order, _, ends = kernels["choose_experts"](logits, 3, True)
    how = kind, ROWS, both[0].zero_point
    gated = kernels["packed_experts"](x, order, ends, *lists(both), *how)
    plain = kernels["packed_experts"](x, order, ends, *lists(both[:1]), *how)
    rows, start = x[order], 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            panels = slice(expert * ROWS // PANEL_ROWS, (expert + 1) * ROWS // PANEL_ROWS)
            own = lists(both, panels)
            alone = kernels["packed_gated"](rows[start:end], None, 0.0, *own, *how)
            assert torch.equal(gated[start:end], alone)
            data, scales, mins = (each[0] if each else None for each in own)
            given = data, scales, mins, None, None, *how, False
            assert torch.equal(plain[start:end], kernels["packed_matmul"](rows[start:end], *given))
        start = end


def test_equal_experts_are_taken_in_their_order(kernels: dict[str, Kernel]) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]])
    weights, chosen, *_ = kernels["choose_experts"](logits, 4, False)
    assert chosen.tolist() == [[1, 3, 4, 2]]
    assert weights[0, 0] == weights[0, 1] == weights[0, 2] > weights[0, 3]


@pytest.mark.parametrize(
    ("order", "ends"),
    [
        ([0, 1, 2], [1, 1, 1, 1, 1, 1, 2]),  # one choice of no expert
        ([0, 1, 2], [1, 0, 3, 3, 3, 3, 3]),
        ([0, 1, 3], [3, 3, 3, 3, 3, 3, 3]),  # there is no row 3
        ([0, -1, 2], [3, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_rows_that_there_are_not_are_refused(
    kernels: dict[str, Kernel], order: list[int], ends: list[int]
) -> None:
    both, x = matrices("int4", 32), torch.zeros(3, COLUMNS)
    how = "int4", ROWS, both[0].zero_point
    with pytest.raises(KernelError, match="order or ends"):
        kernels["packed_experts"](x, torch.tensor(order), torch.tensor(ends), *lists(both), *how)


def test_what_does_not_fit_is_refused(kernels: dict[str, Kernel]) -> None:
    both, x = matrices("int4", 32), torch.zeros(3, COLUMNS)
    ends = torch.full((EXPERTS,), 3)
    with pytest.raises(KernelError, match="packed_experts"):
        kernels["packed_experts"](x, None, ends.int(), *lists(both), "int4", ROWS, 8)
    order = torch.zeros(6, dtype=torch.int64)[::2]  # every second number in memory
    with pytest.raises(KernelError, match="packed_experts"):
        kernels["packed_experts"](x, order, ends, *lists(both), "int4", ROWS, 8)
    with pytest.raises(KernelError, match="rows an expert"):
        kernels["packed_experts"](x, None, ends, *lists(both), "int4", ROWS - 1, 8)
    with pytest.raises(KernelError, match="4 of 3 experts"):
        kernels["choose_experts"](torch.zeros(2, 3), 4, False)
    places = torch.tensor([[0], [2]])
    with pytest.raises(KernelError, match="from 0 to 1"):
        kernels["mix_experts"](torch.zeros(2, 8), torch.zeros(2, 1), places, None, None, None)
    with pytest.raises(KernelError, match="do not fit"):
        kernels["mix_experts"](torch.zeros(2, 8), torch.zeros(2, 1), places[:1], None, None, None)
