"""Address and undefined-behaviour sanitizers over the cases of every op with a native kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features

pytestmark = pytest.mark.oracle

PROGRAM = """
import ctypes, sys
from pathlib import Path
import torch
from qwenkit.kernels.cpu.bind import load_kernels
from qwenkit.kernels.registry import OPS

path = Path(sys.argv[1])
if sys.argv[2] == "overrun":
    x = torch.ones(8)
    arguments = (ctypes.c_int64 * 5)(*[x.data_ptr()] * 3, 9, 1)
    ctypes.CDLL(str(path)).qk_silu_mul(arguments)

def exact(value):
    # In memory of its own, without a byte to spare, so that reading beyond the end is noticed.
    return value.contiguous().clone() if isinstance(value, torch.Tensor) else value

for name, kernel in load_kernels(path).items():
    for arguments in OPS[name].cases():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernel(*map(exact, arguments))
print("clean")
"""


def _runtime(name: str) -> str:
    compiler = build.find_compiler()
    done = subprocess.run(
        [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = done.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"this compiler has no {name}")
    return path


def _run(variant: build.Variant, what: str) -> subprocess.CompletedProcess[str]:
    try:
        if not variant.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {variant.name}")
        preloaded = f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}"
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build.build_variant(variant, extra_flags=flags)
    environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name) for v in build.VARIANTS])
def test_op_cases_are_clean(variant: build.Variant) -> None:
    done = _run(variant, "cases")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_an_overrun_would_be_noticed() -> None:
    done = _run(build.VARIANTS[-1], "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
