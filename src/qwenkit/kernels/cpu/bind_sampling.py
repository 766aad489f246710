"""The choice of tokens as a Python function."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.sample_tokens import KINDS, SETTINGS, sample_tokens

_POINTERS = ("logits", "rows", "ids", "starts", "numbers", "settings", "tokens")
_COUNTS = ("row_count", "logit_rows", "stride", "count", "vocab_size", "id_count", "threads")
_DTYPES = torch.float64, torch.float32, torch.int64, torch.int64, torch.int64
_NO_MEMORY = 2  # a status; other ones: rows or ids are not such as there are


class _SampleTokens(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in _POINTERS),
        *((n, c_int64) for n in _COUNTS),
    )


def bind_sample_tokens(library: ctypes.CDLL) -> Kernel:
    call, reference = kernel(library, "qk_sample_tokens", _SampleTokens), sample_tokens.reference

    def run(
        settings: torch.Tensor,
        logits: torch.Tensor,
        rows: torch.Tensor,
        ids: torch.Tensor,
        numbers: torch.Tensor,
        starts: torch.Tensor,
        vocab_size: int,
    ) -> torch.Tensor:
        if not len(rows) or logits.dtype is not torch.float32 or not logits.is_cpu:
            given = settings, logits, rows, ids, numbers, starts, vocab_size
            return reference(*given)  # type: ignore[no-any-return]
        of, count = f"sample_tokens of {vocab_size}", logits.shape[-1]
        shapes = (
            logits.dim() == 2 and logits.stride(1) == 1,
            settings.shape == (len(rows), len(SETTINGS)),
            starts.shape == (len(KINDS) * len(rows) + 1,),
            len(numbers) == len(ids),
            1 <= vocab_size <= count,
        )
        dtypes = settings.dtype, numbers.dtype, rows.dtype, ids.dtype, starts.dtype
        if not all(shapes) or dtypes != _DTYPES:
            raise refuse(of, logits=logits, settings=settings, ids=ids, starts=starts)
        whole = [tensor.contiguous() for tensor in (rows, ids, starts, numbers, settings)]
        tokens = torch.empty_like(rows)
        arguments = _SampleTokens(
            *(tensor.data_ptr() for tensor in (logits, *whole, tokens)),
            *(len(rows), len(logits), logits.stride(0), count, vocab_size, len(ids)),
            torch.get_num_threads(),
        )
        status = call(arguments)
        if status == _NO_MEMORY:
            raise KernelError(f"sample_tokens: no memory for {vocab_size} scores.")
        if status:
            raise refuse(of, logits=logits, rows=rows, ids=ids, starts=starts)
        return tokens

    return run
