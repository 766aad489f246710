"""The pool under the native kernels: the same bits, no more threads than asked for, no spinning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.cpu.bind import cpu_features
from qwenkit.kernels.cpu.place import whole_cores_first

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


PINNING = """
import ctypes, os, sys
from pathlib import Path
from qwenkit.kernels.cpu.bind import load_kernels
from qwenkit.kernels.cpu.library import open_library
from qwenkit.kernels.cpu.place import place_helpers
import torch

path = Path(sys.argv[1])
mine = os.sched_getaffinity(0)
threads = 1
torch.get_num_threads = lambda: threads  # setting torch's own number starts threads of its own
x = torch.ones(400_001)
run = load_kernels(path)["silu_mul"]
others = {int(t) for t in os.listdir("/proc/self/task")}

def work(count):
    global threads
    threads = count
    run(x, x)
    return {int(t) for t in os.listdir("/proc/self/task")} - others

(first,) = work(2)
place_helpers(open_library(path), pin=True)
kept = os.sched_getaffinity(first)
assert len(kept) == 1 and kept <= mine, kept
helpers = work(3)  # one that comes later is placed too
assert len(helpers) == 2
placed = [os.sched_getaffinity(t) for t in sorted(helpers)]
assert all(len(p) == 1 for p in placed), placed
assert len(mine) < 2 or placed[0] != placed[1]
assert os.sched_getaffinity(0) == mine  # the caller's threads to come are not bound
place_helpers(open_library(path), pin=False)
assert all(os.sched_getaffinity(t) == mine for t in helpers)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are pinned on Linux only")
def test_helpers_are_pinned_on_request_and_the_caller_never(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PINNING, str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_each_core_is_used_before_its_second_half(tmp_path: Path) -> None:
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        place = tmp_path / f"cpu{processor}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(siblings + "\n")
    assert whole_cores_first({3, 2, 1, 0}, tmp_path) == [0, 1, 2, 3]
    assert whole_cores_first({0, 2, 3}, tmp_path) == [0, 3, 2]
    assert whole_cores_first({5, 4}, tmp_path / "none") == [4, 5]


def test_registering_pins_once_asked(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(bind, "place_helpers", lambda library, *, pin: asked.append(pin))
    bind.register()
    assert asked == []
    bind.register(pin_threads=True)
    assert asked == [True]
