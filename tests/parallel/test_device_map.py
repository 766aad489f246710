"""Which part goes where, decided without any device."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.errors import UsageError
from qwenkit.kernels.devices import Device
from qwenkit.parallel.device_map import (
    DeviceMap,
    Parts,
    fit_to_memory,
    place_as_given,
    split_evenly,
)

# Layers on each card as `_device_map` of the script utils.py in QwenLM/Qwen shares them out, by
# number of layers (Qwen-7B has 32, Qwen-14B 40) and of cards. The last of eight has the head only.
PUBLISHED = {
    (32, 2): [16, 16],
    (32, 3): [11, 12, 9],
    (32, 4): [8, 9, 9, 6],
    (32, 5): [6, 7, 7, 7, 5],
    (32, 6): [5, 6, 6, 6, 6, 3],
    (32, 7): [4, 5, 5, 5, 5, 5, 3],
    (32, 8): [4, 5, 5, 5, 5, 5, 3, 0],
    (40, 2): [20, 20],
    (40, 3): [13, 14, 13],
    (40, 4): [10, 11, 11, 8],
    (40, 5): [8, 9, 9, 9, 5],
    (40, 6): [6, 7, 7, 7, 7, 6],
    (40, 7): [5, 6, 6, 6, 6, 6, 5],
    (40, 8): [5, 6, 6, 6, 6, 6, 5, 0],
}
GIB = 2**30


def qwen(layers: int, *, tied: bool = False) -> Parts:
    blocks = tuple(f"transformer.h.{i}" for i in range(layers))
    return Parts("transformer.wte", blocks, "transformer.ln_f", "lm_head", tied=tied)


def cards(*free_bytes: int | None) -> list[Device]:
    return [Device(f"cuda:{i}", "card", True, True, free) for i, free in enumerate(free_bytes)]


@pytest.mark.parametrize(("layers", "count"), PUBLISHED)
def test_an_even_split_is_the_published_one(layers: int, count: int) -> None:
    names = [f"cuda:{i}" for i in range(count)]
    placed = split_evenly(qwen(layers), names)
    assert [placed.layer_devices.count(name) for name in names] == PUBLISHED[layers, count]
    assert list(placed.layer_devices) == sorted(placed.layer_devices)
    ends = [placed.devices[p] for p in ("transformer.wte", "transformer.ln_f", "lm_head")]
    assert ends == ["cuda:0", "cuda:0", f"cuda:{count - 1}"]


def test_a_tied_head_stays_with_its_embedding() -> None:
    assert split_evenly(qwen(4, tied=True), ["cuda:0", "cuda:1"]).devices["lm_head"] == "cuda:0"
    with pytest.raises(UsageError, match="'lm_head' uses the weight of"):
        place_as_given(qwen(4, tied=True), {"": "cuda:0", "lm_head": "cuda:1"})


@pytest.mark.parametrize("count", [0, 5])
def test_more_devices_than_layers_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"num_gpus: got {count}, but the model has 4 layers"):
        split_evenly(qwen(4), [f"cuda:{i}" for i in range(count)])


def test_the_longest_path_decides() -> None:
    given = {"": "cpu", "transformer.h": "cuda:0", "transformer.h.3": "cuda:1"}
    placed = place_as_given(qwen(4), given)
    assert placed.layer_devices == ("cuda:0", "cuda:0", "cuda:0", "cuda:1")
    assert placed.devices["lm_head"] == placed.first == "cpu"
    assert placed.single is None
    assert place_as_given(qwen(4), {"": "cuda:1"}).single == "cuda:1"
    assert str(placed) == (
        "embedding on cpu, layers 0–2 on cuda:0, layer 3 on cuda:1, norm on cpu, head on cpu"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"": "cpu", "transformer.h.4": "cpu"}, "no part is 'transformer.h.4'.*'transformer.h.3'"),
        ({"": "cpu", "transformer.h.1.mlp": "cuda:0"}, "inside of 'transformer.h.1'.*whole block"),
        ({"transformer": "cpu"}, "says nothing of 'lm_head'"),
        ({}, "says nothing of 'transformer.wte'"),
    ],
)
def test_maps_that_cannot_be(given: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^device_map: .*{said}"):
        place_as_given(qwen(4), given)


def sizes(parts: Parts, *, block: int = GIB, ends: int = GIB) -> dict[str, int]:
    return dict.fromkeys(parts.paths, ends) | dict.fromkeys(parts.blocks, block)


def test_the_first_device_that_holds_everything_is_enough() -> None:
    parts = qwen(4)  # 7 GiB
    assert fit_to_memory(parts, sizes(parts), cards(5 * GIB, 8 * GIB, 80 * GIB)).single == "cuda:1"
    assert fit_to_memory(parts, sizes(parts), cards(5 * GIB, None)).single == "cuda:1"


def test_what_fits_no_accelerator_is_on_the_processor() -> None:
    parts = qwen(4)
    placed = fit_to_memory(parts, sizes(parts), cards(3 * GIB, 3 * GIB))  # two parts each
    assert [placed.devices[path] for path in parts.paths] == [
        *("cuda:0", "cuda:0", "cuda:1", "cuda:1"),
        *("cpu", "cpu", "cpu"),
    ]
    tied = qwen(4, tied=True)
    assert fit_to_memory(tied, sizes(tied), cards(3 * GIB)).devices["lm_head"] == "cuda:0"


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
)
def test_no_device_is_filled_beyond_its_memory(
    free: list[int], layers: int, block: int, tied: bool
) -> None:
    parts = qwen(layers, tied=tied)
    needed = sizes(parts, block=block, ends=3) | ({"lm_head": 0} if tied else {})
    devices = cards(*free)
    placed: DeviceMap = fit_to_memory(parts, needed, devices)
    assert set(placed.devices) == set(parts.paths)
    for device in devices:
        used = sum(needed[path] for path, name in placed.devices.items() if name == device.name)
        assert used <= 0.9 * (device.free_bytes or 0)
    order = [*(device.name for device in devices), "cpu"]
    places = [order.index(placed.devices[path]) for path in (*parts.blocks, parts.norm)]
    assert all(earlier <= later for earlier, later in pairwise(places)), "a device comes again"
