"""The choice of tokens as a Python function."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from itertools import pairwise

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.sample_tokens import KINDS, SETTINGS, sample_tokens

_POINTERS = ("logits", "rows", "ids", "starts", "numbers", "settings", "tokens")
_COUNTS = ("row_count", "stride", "count", "vocab_size", "most_ids", "threads")


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
        count = logits.shape[-1]
        shapes = (
            logits.dim() == 2 and logits.stride(1) == 1,
            settings.shape == (len(rows), len(SETTINGS)),
            starts.shape == (len(KINDS) * len(rows) + 1,),
        )
        dtypes = settings.dtype, numbers.dtype, rows.dtype, ids.dtype, starts.dtype
        if not all(shapes) or dtypes != (torch.float64, torch.float32, *[torch.int64] * 3):
            raise refuse("sample_tokens", logits=logits, settings=settings, ids=ids, starts=starts)
        ends, places = starts.tolist(), rows.tolist()
        fits = ends[0] == 0 and ends == sorted(ends) and ends[-1] == len(ids) == len(numbers)
        none = not ends[-1]
        inside = none or (int(ids.min()) >= 0 and int(ids.max()) < count)
        there = min(places) >= 0 and max(places) < len(logits) and len({*places}) == len(places)
        if not (fits and inside and there and 1 <= vocab_size <= count):
            wrong = {"logits": logits, "rows": rows, "ids": ids, "starts": starts}
            raise refuse(f"sample_tokens of {vocab_size}", **wrong)
        ids, numbers, settings = ids.contiguous(), numbers.contiguous(), settings.contiguous()
        rows, starts = rows.contiguous(), starts.contiguous()
        tokens = torch.empty_like(rows)
        of_rows = ends[:: len(KINDS)]
        most = 0 if none else max(end - start for start, end in pairwise(of_rows))
        arguments = _SampleTokens(
            *(t.data_ptr() for t in (logits, rows, ids, starts, numbers, settings, tokens)),
            *(len(rows), logits.stride(0), count, vocab_size, most, torch.get_num_threads()),
        )
        if call(arguments):
            raise KernelError(f"sample_tokens: no memory for {vocab_size} scores.")
        return tokens

    return run
