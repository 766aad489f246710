"""The threads under the native kernels: torch's where there is an OpenMP runtime, else our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features

# A process without torch has no OpenMP runtime: the same library then brings its own threads.
OWN_POOL = """
import ctypes, os, random, sys, threading
library = ctypes.CDLL(sys.argv[1])
assert library.qk_shares_openmp() == 0
count = 400_001
Numbers = ctypes.c_float * count
gate, up = Numbers(), Numbers()
random.seed(0)
for i in range(0, count, 97):
    gate[i], up[i] = random.gauss(0, 3), random.gauss(0, 3)

def run(threads):
    y = Numbers()
    library.qk_silu_mul(gate, up, y, ctypes.c_int64(count), threads)
    return bytes(y)

want = run(1)
assert len(os.listdir("/proc/self/task")) == 1
for threads in (2, 3, 5, 2, 1, 5):
    for _ in range(20):
        assert run(threads) == want
assert len(os.listdir("/proc/self/task")) == 5  # grown on demand, shared, never more

results = []
def many():
    results.append(all(run(4) == want for _ in range(20)))
callers = [threading.Thread(target=many) for _ in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert results == [True] * 3

child = os.fork()  # inherits no threads, and must not wait for any
if child == 0:
    os._exit(0 if run(4) == want else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""

# With torch: no thread is added to those that torch has, and a forked child works alone.
SHARED_POOL = """
import os, sys
import torch
from pathlib import Path
from qwenkit.kernels.cpu.bind import _open, bind
library = _open(Path(sys.argv[1]))
if not library.qk_shares_openmp():
    print("no OpenMP in this torch")
    sys.exit()
torch.set_num_threads(2)
x = torch.randn(2000, 512)
(x @ x.T).exp().sum()
threads = len(os.listdir("/proc/self/task"))
silu_mul = bind(library)["silu_mul"]
want = silu_mul(x, x)
for _ in range(50):
    assert torch.equal(silu_mul(x, x), want)
    (x @ x.T).exp().sum()
assert len(os.listdir("/proc/self/task")) == threads
child = os.fork()
if child == 0:
    y = silu_mul(x, x)
    os._exit(0 if y[-1].tolist() == want[-1].tolist() else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        variants = build.usable_variants(frozenset(cpu_features()))
        return build.build_variant(variants[0])
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


def _run(code: str, library: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_own_pool_gives_the_same_bits_grows_on_demand_and_survives_a_fork(library: Path) -> None:
    assert _run(OWN_POOL, library) == "fine"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_beside_torch_no_thread_is_added(library: Path) -> None:
    outcome = _run(SHARED_POOL, library)
    if outcome != "fine":
        pytest.skip(outcome)
