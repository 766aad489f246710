"""The product of a LoRA adapter as a Python function: twice the product with a packed matrix."""

from __future__ import annotations

import ctypes

import torch

from qwenkit.kernels.cpu.bind_packed import Factors, Multiply
from qwenkit.kernels.cpu.library import Kernel, refuse
from qwenkit.kernels.ops.add_low_rank import add_low_rank


def bind_add_low_rank(library: ctypes.CDLL) -> Kernel:
    multiply, reference = Multiply(library, "add_low_rank"), add_low_rank.reference
    float32 = torch.float32

    def run(
        y: torch.Tensor,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        rank: int,
    ) -> None:
        if not (x.numel() and y.numel() and y.is_floating_point() and x.is_floating_point()):
            reference(y, x, down, up, bias, rank)
            return
        if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not y.is_cpu:
            raise refuse("add_low_rank", y=y, x=x)
        [low] = multiply(x.to(float32), Factors("fp32", (rank,), 0, (down,)))  # [tokens, rank]
        biases = () if bias is None else (bias,)
        factors = Factors("fp32", (y.shape[1],), 0, (up,), biases=biases)
        # Each number of y is read and then written at its own place.
        if y.dtype is float32 and y.is_contiguous():
            multiply(low, factors, residual=y, into=y)
        else:
            y.copy_(multiply(low, factors, residual=y.to(float32).contiguous())[0])

    return run
