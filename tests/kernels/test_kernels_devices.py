"""Which devices are found, and what is computed in on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenkit.errors import UsageError
from qwenkit.kernels import devices
from qwenkit.kernels.devices import Device, choose_precision, find_accelerators, find_device

CPU = Device("cpu", "processor", bf16=True, fp16=False)
OLD_CPU = Device("cpu", "processor", bf16=False, fp16=False)
AMPERE = Device("cuda:0", "A100", bf16=True, fp16=True)
VOLTA = Device("cuda:1", "V100", bf16=False, fp16=True)
PASCAL = Device("cuda:2", "P100", bf16=False, fp16=False)


@pytest.mark.parametrize(
    ("found", "stored", "native", "dtype"),
    [
        ([AMPERE], {"BF16"}, False, torch.bfloat16),
        ([AMPERE], {"F32"}, False, torch.bfloat16),
        ([VOLTA], {"BF16"}, False, torch.float16),
        ([AMPERE, VOLTA], {"BF16"}, False, torch.float16),
        ([AMPERE, CPU], {"BF16"}, False, torch.bfloat16),
        ([VOLTA, CPU], {"F16"}, False, torch.float32),
        ([PASCAL], {"F16"}, False, torch.float32),
        ([CPU], {"BF16"}, False, torch.bfloat16),
        ([CPU], {"BF16"}, True, torch.float32),
        ([CPU], {"BF16", "F32"}, False, torch.float32),
        ([CPU], {"F16"}, False, torch.float32),
        ([OLD_CPU], {"BF16"}, False, torch.float32),
    ],
)
def test_precision_left_to_the_machine(
    found: list[Device], stored: set[str], native: bool, dtype: torch.dtype
) -> None:
    assert choose_precision("auto", stored, found, native=native).dtype == dtype


@pytest.mark.parametrize(
    ("asked", "found", "said"),
    [
        ("float32", [AMPERE, OLD_CPU], None),
        ("bfloat16", [AMPERE], None),
        ("bfloat16", [CPU], None),
        ("bfloat16", [AMPERE, VOLTA], r"cuda:1 \(V100\) does not compute in bfloat16 itself"),
        ("bfloat16", [OLD_CPU], r"cpu \(processor\) does not compute in bfloat16 itself"),
        ("float16", [VOLTA], None),
        ("float16", [PASCAL], r"cuda:2 \(P100\) does not compute in float16 itself"),
    ],
)
def test_a_choice_is_kept_and_its_price_said(
    asked: str, found: list[Device], said: str | None
) -> None:
    precision = choose_precision(asked, {"BF16"}, found)
    assert precision.dtype == devices.DTYPES[asked]
    if said is None:
        assert precision.remarks == ()
    else:
        with pytest.raises(ValueError, match=said):
            raise ValueError(*precision.remarks)


def test_half_precision_is_never_silent_on_a_processor() -> None:
    (remark,) = choose_precision("auto", {"F16"}, [CPU]).remarks
    assert "stored in float16" in remark
    (remark,) = choose_precision("auto", {"BF16"}, [VOLTA]).remarks
    assert "may go beyond" in remark
    (remark,) = choose_precision("bfloat16", {"BF16"}, [CPU], native=True).remarks
    assert "native kernels compute in float32" in remark
    for found in ([CPU], [AMPERE, CPU]):
        with pytest.raises(UsageError, match=r"^dtype: float16 overflows.*bfloat16 or float32"):
            choose_precision("float16", {"F16"}, found)
    with pytest.raises(UsageError, match=r"^dtype: got 'fp16'\. "):
        choose_precision("fp16", {"F16"}, [AMPERE])


def _backend(monkeypatch: pytest.MonkeyPatch, kind: str, **functions: Any) -> None:
    """Let torch have a backend of this kind with two devices, 3 GiB free of 4 each."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda index: (3 << 30, 4 << 30),
        "get_device_name": lambda index: f"card {index}",
        **functions,
    }
    monkeypatch.setattr(torch, kind, SimpleNamespace(**answers), raising=False)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing but a processor."""
    for kind in devices.ACCELERATORS:
        monkeypatch.setattr(torch, kind, None, raising=False)


def test_a_processor_is_found_without_waking_accelerators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wake() -> tuple[Device, ...]:
        raise AssertionError("an accelerator was asked")

    monkeypatch.setattr(devices, "find_accelerators", wake)
    assert find_device("cpu").is_cpu


@pytest.mark.usefixtures("bare")
def test_a_bare_machine_has_a_processor() -> None:
    assert find_accelerators() == ()
    assert find_device("cpu") == find_device("cpu:0") == devices.find_cpu()
    with pytest.raises(UsageError, match=r"^device: 'cuda:0' is not there\. Allowed: cpu\."):
        find_device("cuda:0")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("generation", "bf16", "fp16"),
    [((6, 1), False, False), ((7, 0), False, True), ((8, 0), True, True), ((9, 0), True, True)],
)
def test_cuda_is_read_by_its_generation(
    monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int], bf16: bool, fp16: bool
) -> None:
    _backend(monkeypatch, "cuda", get_device_capability=lambda index: generation)
    first, second = find_accelerators()
    assert first == Device("cuda:0", "card 0", bf16, fp16, 3 << 30, 4 << 30)
    assert (second.name, second.title) == ("cuda:1", "card 1")
    assert find_device("cuda") == first
    assert find_device("cuda:1") == second
    with pytest.raises(UsageError, match=r"'cuda:2' is not there\. Did you mean 'cuda:[01]'"):
        find_device("cuda:2")


@pytest.mark.usefixtures("bare")
def test_the_other_kinds_are_found_where_their_backends_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _backend(monkeypatch, "xpu")
    _backend(monkeypatch, "npu", is_bf16_supported=lambda: False)
    apple = {"recommended_max_memory": lambda: 8 << 30, "driver_allocated_memory": lambda: 1 << 30}
    _backend(monkeypatch, "mps", device_count=lambda: 1, **apple)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = {device.name: device for device in find_accelerators()}
    assert list(found) == ["xpu:0", "xpu:1", "npu:0", "npu:1", "mps:0"]
    assert found["xpu:1"] == Device("xpu:1", "card 1", True, True, 3 << 30, 4 << 30)
    assert found["npu:0"] == Device("npu:0", "card 0", False, True, 3 << 30, 4 << 30)
    assert found["mps:0"] == Device("mps:0", "Apple GPU", True, True, 7 << 30, 8 << 30)


@pytest.mark.usefixtures("bare")
def test_a_backend_that_does_not_work_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _backend(monkeypatch, "npu", is_available=lambda: False)
    assert find_accelerators() == ()
