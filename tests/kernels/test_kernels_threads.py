"""The pool under the native kernels: the same bits, no more threads than asked for, no spinning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features

# Without Python between the library and its callers: ctypes gives up the interpreter's lock.
PROGRAM = """
import ctypes, os, random, sys, threading, time
library = ctypes.CDLL(sys.argv[1])
count = 400_001
Numbers = ctypes.c_float * count
gate, up = Numbers(), Numbers()
random.seed(0)
for i in range(0, count, 97):
    gate[i], up[i] = random.gauss(0, 3), random.gauss(0, 3)

def run(threads):
    y = Numbers()
    pointers = (ctypes.addressof(numbers) for numbers in (gate, up, y))
    library.qk_silu_mul((ctypes.c_int64 * 5)(*pointers, count, threads))
    return bytes(y)

def tasks():
    return len(os.listdir("/proc/self/task"))

want = run(1)
assert tasks() == 1
for threads in (2, 3, 5, 2, 1, 5):
    for _ in range(20):
        assert run(threads) == want
assert tasks() == 5  # the caller and four helpers: grown on demand, never more

results = []
def many():
    results.append(all(run(4) == want for _ in range(20)))
callers = [threading.Thread(target=many) for _ in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert results == [True] * 3
for _ in range(500):  # a joined thread leaves the list a little later
    if tasks() > 5: time.sleep(0.01)
assert tasks() == 5  # one caller had the pool, the others worked alone

spent = time.process_time()
time.sleep(1)
assert time.process_time() - spent < 0.5  # four helpers that spin would have spent up to 4 s

child = os.fork()  # inherits no threads, and must not wait for any
if child == 0:
    os._exit(0 if run(4) == want else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        variants = build.usable_variants(frozenset(cpu_features()))
        return build.build_variant(variants[0])
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_the_pool_gives_the_same_bits_grows_on_demand_sleeps_and_survives_a_fork(
    library: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
