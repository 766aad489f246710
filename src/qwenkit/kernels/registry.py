"""The op registry: one `Op` per file of `kernels/ops`, and the backends that run it faster.

An op is its torch reference until a backend registers for a device type. The reference stays the
oracle: the contract test compares every backend with it on `cases()`. References are written in
differentiable torch, so whenever a gradient is wanted the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[Any, ...]

OPS: dict[str, Op] = {}  # the one piece of global mutable state; filled at import, see `Op`

_reference_only: ContextVar[bool] = ContextVar("qwenkit_reference_only", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside this block every op runs its torch reference, whatever backends are registered."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: what it takes and gives, how it is computed, how it is tested.

    `schema` is a torch.library schema without the name. `shape` maps meta tensors to meta outputs.
    `cases` yields argument tuples, adversarial ones included. `tolerance` bounds the difference
    between a backend and the reference, relative to the largest magnitude of the reference;
    `bf16_tolerance`, where it is given, of calls with a bf16 tensor. Creating an Op registers it
    under `name`.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    shape: Callable[..., Any]
    cases: Callable[[], Iterable[Arguments]]
    tolerance: float = 1e-5
    bf16_tolerance: float | None = None
    backends: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def bound(self, arguments: Arguments) -> float:
        """The tolerance of a call with these arguments."""
        if self.bf16_tolerance is None:
            return self.tolerance
        tensors = (a for a in arguments if isinstance(a, torch.Tensor))
        narrow = any(t.dtype is torch.bfloat16 for t in tensors)
        return self.bf16_tolerance if narrow else self.tolerance

    def __call__(self, *arguments: Any) -> Any:
        """Run on the device of the first argument, which must be a tensor."""
        backend = self.backends.get(arguments[0].device.type) if self.backends else None
        if backend is None or _reference_only.get() or _wants_gradient(arguments):
            return self.reference(*arguments)
        return backend(*arguments)


def _wants_gradient(arguments: Arguments) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in arguments
    )
