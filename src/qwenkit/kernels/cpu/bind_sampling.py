"""The choice of tokens as a Python function."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from itertools import pairwise

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.sample_tokens import KINDS, SETTINGS, sample_tokens


class _SampleTokens(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("logits", "ids", "starts", "numbers", "settings", "tokens")),
        *((n, c_int64) for n in ("rows", "count", "vocab_size", "most_ids", "threads")),
    )


def bind_sample_tokens(library: ctypes.CDLL) -> Kernel:
    call, reference = kernel(library, "qk_sample_tokens", _SampleTokens), sample_tokens.reference

    def run(
        settings: torch.Tensor,
        logits: Sequence[torch.Tensor],
        ids: torch.Tensor,
        numbers: torch.Tensor,
        starts: torch.Tensor,
        vocab_size: int,
    ) -> torch.Tensor:
        rows = len(logits)
        if not rows or not all(row.dtype is torch.float32 and row.is_cpu for row in logits):
            given = settings, logits, ids, numbers, starts, vocab_size
            return reference(*given)  # type: ignore[no-any-return]
        count = len(logits[0])
        shapes = settings.shape == (rows, len(SETTINGS)), starts.shape == (len(KINDS) * rows + 1,)
        dtypes = settings.dtype, numbers.dtype, ids.dtype, starts.dtype
        if not all(shapes) or dtypes != (torch.float64, torch.float32, *[torch.int64] * 2):
            raise refuse("sample_tokens", settings=settings, ids=ids, starts=starts)
        ends = starts.tolist()
        fits = ends[0] == 0 and ends == sorted(ends) and ends[-1] == len(ids) == len(numbers)
        inside = not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < count)
        even = all(row.shape == (count,) and row.is_contiguous() for row in logits)
        if not (fits and inside and even and 1 <= vocab_size <= count):
            raise refuse(f"sample_tokens of {vocab_size}", logits=logits[0], ids=ids, starts=starts)
        ids, numbers, settings = ids.contiguous(), numbers.contiguous(), settings.contiguous()
        tokens = torch.empty(rows, dtype=torch.int64)
        pointers = (c_void_p * rows)(*[row.data_ptr() for row in logits])
        of_rows = ends[:: len(KINDS)]
        most = max(end - start for start, end in pairwise(of_rows))
        arguments = _SampleTokens(
            ctypes.addressof(pointers),
            *(t.data_ptr() for t in (ids, starts, numbers, settings, tokens)),
            *(rows, count, vocab_size, most, torch.get_num_threads()),
        )
        if call(arguments):
            raise KernelError(f"sample_tokens: no memory for {vocab_size} scores.")
        return tokens

    return run
