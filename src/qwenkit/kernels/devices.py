"""The devices that torch finds here, and the number formats that they compute in.

Ops have native kernels on the CPU; everywhere else their torch references run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwenkit.errors import UsageError, suggest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# torch's names of NVIDIA's and AMD's, Intel's, Ascend's and Apple's; Ascend's is there when the
# package torch_npu is, which torch imports by itself.
ACCELERATORS = ("cuda", "xpu", "npu", "mps")


@dataclass(frozen=True, slots=True)
class Device:
    """`name` is torch's, such as "cuda:0"; `bf16` and `fp16` say what it computes in at full speed.

    `free_bytes` and `total_bytes` are those of its own memory; None: not known.
    """

    name: str
    title: str
    bf16: bool
    fp16: bool
    free_bytes: int | None = None
    total_bytes: int | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name.partition(":")[0] == "cpu"


def find_cpu() -> Device:
    """The processor. float16 is never its choice: it is slow there, and Qwen's activations go
    beyond its range.
    """
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Device("cpu", "processor", bf16=bf16, fp16=False)


def find_accelerators() -> tuple[Device, ...]:
    """Every device beside the processor whose torch backend is installed and works."""
    return tuple(
        _READERS[kind](index)
        for kind in ACCELERATORS
        if (backend := _available(kind)) is not None
        for index in range(backend.device_count())
    )


def find_device(name: str) -> Device:
    """The device of a torch name; of a kind alone, such as "cuda", its first.

    Raises UsageError naming the devices that there are.
    """
    if name in ("cpu", "cpu:0"):  # without waking any accelerator, which takes memory of it
        return find_cpu()
    found = {device.name: device for device in find_accelerators()}
    wanted = name if ":" in name else f"{name}:0"
    if wanted not in found:
        raise UsageError(f"device: {name!r} is not there. {suggest(name, ('cpu', *found))}")
    return found[wanted]


def _available(kind: str) -> Any:
    """torch's module of a kind of accelerator; None where it has none that works."""
    module: Any = getattr(torch, kind, None)
    says: Any = torch.backends.mps if kind == "mps" else module
    return module if module is not None and says.is_available() else None


def _read_cuda(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    generation = torch.cuda.get_device_capability(index)[0]  # Ampere, 8, has bf16; Volta, 7, fp16
    title = torch.cuda.get_device_name(index)
    return Device(f"cuda:{index}", title, generation >= 8, generation >= 7, free, total)


def _read_xpu(index: int) -> Device:
    free, total = torch.xpu.mem_get_info(index)
    return Device(f"xpu:{index}", torch.xpu.get_device_name(index), True, True, free, total)


def _read_npu(index: int) -> Device:
    module: Any = _available("npu")
    free, total = module.mem_get_info(index)
    bf16 = module.is_bf16_supported()
    return Device(f"npu:{index}", module.get_device_name(index), bf16, True, free, total)


def _read_mps(index: int) -> Device:
    """Apple's; memory is shared with the processor, up to the limit that the system recommends."""
    total = torch.mps.recommended_max_memory()
    free = max(total - torch.mps.driver_allocated_memory(), 0)
    return Device(f"mps:{index}", "Apple GPU", True, True, free, total)


_READERS: dict[str, Callable[[int], Device]] = {
    "cuda": _read_cuda,
    "xpu": _read_xpu,
    "npu": _read_npu,
    "mps": _read_mps,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """What activations are computed in, and what the user should know of it."""

    dtype: torch.dtype
    remarks: tuple[str, ...] = ()


def choose_precision(
    asked: str, stored: Collection[str], devices: Sequence[Device], *, native: bool = False
) -> Precision:
    """The dtype of activations on `devices`, for matrices of the storage tags `stored`.

    "auto" is, with an accelerator, bf16 where all of them compute in it, else fp16 where they do
    and all layers are on them, else fp32, as the first Qwen chose. On a processor alone it is bf16
    for a bf16 checkpoint where the processor computes in that, else fp32, and fp32 with `native`
    kernels, which multiply bf16 weights as they are but add up in fp32.

    Raises UsageError for an unknown name, and for float16 on a processor.
    """
    if asked not in ("auto", *DTYPES):
        raise UsageError(f"dtype: got {asked!r}. {suggest(asked, ['auto', *DTYPES])}")
    if asked != "auto":
        return _as_asked(asked, devices, native=native)
    accelerators = [device for device in devices if not device.is_cpu]
    if not accelerators:
        bf16 = set(stored) == {"BF16"} and not native and all(device.bf16 for device in devices)
        remarks = _HALF_ON_CPU if "F16" in stored else ()
        return Precision(torch.bfloat16 if bf16 else torch.float32, remarks)
    if all(device.bf16 for device in accelerators):
        return Precision(torch.bfloat16)
    if all(device.fp16 for device in devices):
        return Precision(torch.float16, (_OVERFLOW,))
    return Precision(torch.float32)


def _as_asked(asked: str, devices: Iterable[Device], *, native: bool) -> Precision:
    dtype, remarks = DTYPES[asked], []
    for device in devices:
        if asked == "float16" and device.is_cpu:
            raise UsageError(
                "dtype: float16 overflows on Qwen models and is slow on a processor; "
                "use bfloat16 or float32."
            )
        slow = {"bfloat16": not device.bf16, "float16": not device.fp16, "float32": False}[asked]
        if slow:
            remarks.append(
                f"dtype: {device.name} ({device.title}) does not compute in {asked} itself; it "
                "will be slow. Leave dtype out for what suits it."
            )
    if asked == "bfloat16" and native:
        remarks.append(_NATIVE_BF16)
    return Precision(dtype, tuple(remarks))


_HALF_ON_CPU = (
    "dtype: the weights are stored in float16; on a processor activations are float32, since "
    "Qwen's go beyond float16.",
)
_OVERFLOW = (
    "dtype: float16 is the best that this device computes in, and activations of Qwen1.5 and later "
    "may go beyond it; with float32 they do not."
)
_NATIVE_BF16 = (
    "dtype: native kernels compute in float32 whatever the weights are stored in; with bfloat16 "
    "activations most steps run in torch, slower. Leave dtype out."
)
