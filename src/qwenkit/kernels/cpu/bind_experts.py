"""A mixture's routing and its sum as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.choose_experts import Routes, choose_experts
from qwenkit.kernels.ops.mix_experts import mix_experts


class _ChooseExperts(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("logits", "weights", "chosen", "order", "places", "ends")),
        *((n, c_int64) for n in ("tokens", "experts", "count", "normalise", "threads")),
    )


class _MixExperts(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("outputs", "weights", "places", "shared", "gate", "residual")),
        ("y", c_void_p),
        *((n, c_int64) for n in ("choices", "tokens", "count", "width", "threads")),
    )


def bind_choose_experts(library: ctypes.CDLL) -> Kernel:
    call, reference = kernel(library, "qk_choose_experts", _ChooseExperts), choose_experts.reference

    def run(logits: torch.Tensor, count: int, normalise: bool) -> Routes:
        if logits.dtype is not torch.float32 or not logits.numel():
            return reference(logits, count, normalise)  # type: ignore[no-any-return]
        tokens, experts = logits.shape
        if not 1 <= count <= experts:
            raise KernelError(f"choose_experts: {count} of {experts} experts.")
        logits = logits.contiguous()
        made = choose_experts.shape(logits, count, normalise)
        pointers = (t.data_ptr() for t in (logits, *made))
        sizes = tokens, experts, count, normalise, torch.get_num_threads()
        if call(_ChooseExperts(*pointers, *sizes)):
            raise KernelError(f"choose_experts: no memory for {experts} experts.")
        return made  # type: ignore[no-any-return]

    return run


def bind_mix_experts(library: ctypes.CDLL) -> Kernel:
    call, reference = kernel(library, "qk_mix_experts", _MixExperts), mix_experts.reference

    def run(
        outputs: torch.Tensor,
        weights: torch.Tensor,
        places: torch.Tensor,
        shared: torch.Tensor | None,
        gate: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        numbers = [t for t in (outputs, weights, shared, gate, residual) if t is not None]
        if any(t.dtype is not torch.float32 for t in numbers) or not outputs.numel():
            given = outputs, weights, places, shared, gate, residual
            return reference(*given)  # type: ignore[no-any-return]
        (choices, width), (tokens, count) = outputs.shape, places.shape
        whole = tokens, width
        fits = (
            weights.shape == places.shape
            and places.dtype is torch.int64
            and (shared is None or (shared.shape == whole and gate is not None))
            and (gate is None or gate.shape == (tokens, 1))
            and (residual is None or residual.shape == whole)
            and all(t.is_cpu for t in (*numbers, places))
        )
        if not fits:
            raise refuse("mix_experts", outputs=outputs, weights=weights, places=places)
        y = torch.empty(whole, dtype=torch.float32)
        tensors = outputs, weights, places, shared, gate, residual, y
        kept = [None if t is None else t.contiguous() for t in tensors]
        pointers = (None if t is None else t.data_ptr() for t in kept)
        sizes = choices, tokens, count, width, torch.get_num_threads()
        if call(_MixExperts(*pointers, *sizes)):
            raise KernelError(f"mix_experts: places must be from 0 to {choices - 1}.")
        return y

    return run
