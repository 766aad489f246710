"""Every op of `qwenkit.kernels.ops`, found by scanning, keeps the contract of `Op`, and so does
every native backend that this machine can run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import qwenkit.kernels.ops
from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features, load_kernels
from qwenkit.kernels.cpu.library import Kernel
from qwenkit.kernels.registry import OPS, Op, reference_only

MODULES = [m.name for m in pkgutil.iter_modules(qwenkit.kernels.ops.__path__)]
for _name in MODULES:
    importlib.import_module(f"qwenkit.kernels.ops.{_name}")
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
_every_op = pytest.mark.parametrize("op", [pytest.param(OPS[n], id=n) for n in MODULES])


@cache
def _library() -> Any:
    """All ops as torch operators of the namespace `qwenkit`, for torch's own checks."""
    library: Any = torch.library.Library("qwenkit", "DEF")  # type: ignore[no-untyped-call]
    for name in MODULES:
        op = OPS[name]
        library.define(op.name + op.schema)
        library.impl(op.name, op.reference, "CPU")
        torch.library.register_fake(f"qwenkit::{op.name}", op.shape, lib=library)
    return library


def _copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for an op that may write into them; strides are kept."""
    return tuple(_copy(a) if isinstance(a, torch.Tensor) else a for a in arguments)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return fresh.copy_(tensor) if all(tensor.stride()) else tensor.clone()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    if not want.is_floating_point():
        assert torch.equal(got, want), what
        return
    largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance * largest, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def test_a_file_holds_the_op_that_it_is_named_after() -> None:
    assert MODULES
    for name in MODULES:
        module = importlib.import_module(f"qwenkit.kernels.ops.{name}")
        assert getattr(module, name) is OPS[name]
        assert OPS[name].name == name


@_every_op
def test_torch_accepts_schema_and_shape_function(op: Op) -> None:
    _library()
    operator = getattr(torch.ops.qwenkit, op.name).default
    seen = set()
    for arguments in op.cases():
        kinds = tuple((t.dim(), t.dtype, t.is_contiguous()) for t in _tensors(arguments))
        if kinds in seen:
            continue  # torch looks at kinds of arguments, and takes its time
        checks = QUICK_CHECKS if seen else (*QUICK_CHECKS, "test_aot_dispatch_dynamic")
        seen.add(kinds)
        with reference_only():
            torch.library.opcheck(operator, _copies(arguments), test_utils=checks)


@_every_op
def test_shape_function_foretells_the_reference(op: Op) -> None:
    for arguments in op.cases():
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        foretold = list(_tensors(op.shape(*meta)))
        real = list(_tensors(op.reference(*_copies(arguments))))
        assert [(t.shape, t.dtype) for t in foretold] == [(t.shape, t.dtype) for t in real]
        assert all(t.is_meta for t in foretold)


@cache
def _kernels(variant: build.Variant) -> dict[str, Kernel]:
    try:
        if not variant.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {variant.name}")
        return load_kernels(build.build_variant(variant))
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name) for v in build.VARIANTS])
def test_native_kernels_equal_the_references(variant: build.Variant) -> None:
    kernels = _kernels(variant)
    assert set(kernels) <= set(MODULES)
    for name, kernel in kernels.items():
        op = OPS[name]
        for index, arguments in enumerate(op.cases()):
            ours, theirs = _copies(arguments), _copies(arguments)
            got, want = kernel(*ours), op.reference(*theirs)
            what = f"{name}, case {index}"
            pairs = zip(_tensors((got, ours)), _tensors((want, theirs)), strict=True)
            for mine, expected in pairs:
                _assert_close(mine, expected, op.bound(arguments), what)
