"""Accelerators that this machine does not have: tensors that say they are on one.

They hold ordinary tensors, compute with them, and refuse to work with a tensor of another device,
as real ones do. To torch's own C++ they are on "meta", so that it reads no number behind their
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from qwenkit.engine.worker import Worker
from qwenkit.kernels import devices

KIND = "maia"  # a kind that torch knows by name and has no code for
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")


def fake(number: int) -> str:
    """The name of a device that is not there."""
    return f"{KIND}:{number}"


class FakeTensor(torch.Tensor):
    """A tensor on the device `place`; `held` has its numbers."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> FakeTensor:
        with torch.inference_mode(False):  # else it could be no view of a tensor made outside
            made: FakeTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device="meta",
            )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cpu(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(op, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Tensors that are made on such a device."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(op, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """What torch decides in C++ by the device that it sees: where `torch.tensor` makes its result
    and which attention it computes, which is the processor's here.
    """

    def __torch_function__(
        self, called: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if called is torch.tensor and torch.device(options.get("device") or "cpu").type == KIND:
            return torch.tensor(*args, **{**options, "device": None}).to(options["device"])
        if called is scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            places = {t.device for t in (*args, options.get("attn_mask")) if t is not None}
            assert len(places) == 1, f"attention over {places}"
            held, options = tree_map_only(FakeTensor, lambda t: t.held, (args, options))
            return FakeTensor(called(*held, **options), args[0].place)
        return called(*args, **options)


def _compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    places = {t.device for t in given if t.dim() or isinstance(t, FakeTensor)}
    if len(places) > 1 and op._schema.name not in _COPIES:
        raise RuntimeError(f"{op}: tensors on {sorted(map(str, places))}, but one device is needed")
    if op._schema.name == "aten::scalar_tensor":  # of a number beside a tensor
        return op(*args, **{**kwargs, "device": torch.device("cpu")})
    asked = next((d for d in tree_iter((args, kwargs)) if isinstance(d, torch.device)), None)
    if asked is None or (asked.type == "meta" and given):
        place = next((t.device for t in given if isinstance(t, FakeTensor)), None)
    else:
        place = asked if asked.type == KIND else None
    if place is not None:
        args, kwargs = tree_map_only(torch.device, lambda d: torch.device("cpu"), (args, kwargs))
    args, kwargs = tree_map_only(FakeTensor, lambda t: t.held, (args, kwargs))
    result = op(*args, **kwargs)
    if op._schema.is_mutable:
        return given[0] if isinstance(result, torch.Tensor) else result
    if place is None:
        return result
    return tree_map_only(torch.Tensor, lambda t: FakeTensor(t, place), result)


@contextmanager
def on_fake_devices() -> Iterator[None]:
    """Inside this block tensors can be made on and moved to `maia:0`, `maia:1` and so on; by
    engines started in it too, though torch keeps its modes for each thread.
    """
    run = Worker._run

    def run_in_mode(worker: Worker) -> None:
        with _Factories(), _Functions():
            run(worker)

    with pytest.MonkeyPatch.context() as patched, _Factories(), _Functions():
        patched.setattr(Worker, "_run", run_in_mode)
        yield


def fake_machine(
    monkeypatch: pytest.MonkeyPatch,
    *free_bytes: int | None,
    bf16: bool = False,
    fp16: bool = False,
) -> None:
    """Make torch's accelerators be one fake device for each amount of free memory."""
    found = tuple(
        devices.Device(fake(i), "fake", bf16, fp16, free, free) for i, free in enumerate(free_bytes)
    )
    monkeypatch.setattr(devices, "find_accelerators", lambda: found)
