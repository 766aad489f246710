"""The cases of every native kernel again, outside Python: under sanitizers, which must stay silent,
and compiled for ARM under an emulator, with the numbers that this machine computes.

The emulator and the cross compiler are Debian's packages qemu-user and g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from parity import kernel_replay
from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind import cpu_features

pytestmark = pytest.mark.oracle

ARM_COMPILER, ARM_LIBRARIES = "aarch64-linux-gnu-g++", "/usr/aarch64-linux-gnu"
PLAIN = build.VARIANTS[-1]
SANITIZERS = {"memory": "address,undefined", "threads": "thread"}


def _variants(machine: str) -> list[object]:
    return [pytest.param(v, id=v.name) for v in build.machine_variants(machine)]


def _is_much_like_another(variant: build.Variant) -> bool:
    """Whether it is between the best that this processor runs and those of older ones, with whose
    code it has nearly all in common: every one takes two minutes.
    """
    return variant.name not in ("avx2", "plain", build.usable_variants(_features())[0].name)


@cache
def _features() -> frozenset[str]:
    try:
        return frozenset(cpu_features())
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


def _cases(folder: Path, variant: build.Variant) -> Path:
    """The file of what this machine's library computes, recorded once."""
    if not variant.features <= _features():
        pytest.skip(f"this processor does not run the variant {variant.name}")
    file = folder / f"{variant.name}.cases"
    if not file.exists():
        assert kernel_replay.record(variant, file) > 500
    return file


def _driver(folder: Path, variant: build.Variant, sanitizer: str) -> Path:
    driver = folder / f"{variant.name}-{sanitizer}"
    if not driver.exists():
        flags = ("-O1", "-g", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all")
        if not build._knows(build.find_compiler(), flags):
            pytest.skip(f"this compiler has no sanitizer for {sanitizer}")
        kernel_replay.build_driver(build.find_compiler(), variant, driver, *flags)
    return driver


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False
    )


def _assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    found = re.search(r"(\d+) cases, .* (\d+) buffers compared, 0 wrong", done.stdout)
    assert found is not None, done.stdout
    assert int(found[2]) > int(found[1]) > 500


@pytest.mark.parametrize("variant", _variants("x86_64"))
def test_memory_and_arithmetic_are_clean_and_the_bits_the_same(
    folder: Path, variant: build.Variant
) -> None:
    if _is_much_like_another(variant):
        pytest.skip(f"{variant.name} is much like others that are tested here")
    cases = _cases(folder, variant)
    _assert_clean(_run(_driver(folder, variant, "memory"), cases, 0))


def test_threads_are_clean(folder: Path) -> None:
    cases = _cases(folder, PLAIN)
    _assert_clean(_run(_driver(folder, PLAIN, "threads"), cases, 0))


def test_an_overrun_would_be_noticed(folder: Path) -> None:
    done = _run(_driver(folder, PLAIN, "memory"), _cases(folder, PLAIN), 0, "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("variant", _variants("aarch64"))
def test_arm_gives_the_same_numbers(folder: Path, variant: build.Variant) -> None:
    for program in (ARM_COMPILER, "qemu-aarch64"):
        if not shutil.which(program):
            pytest.skip(f"needs {program} (qemu-user and g++-aarch64-linux-gnu in Debian)")
    cases = _cases(folder, PLAIN)
    driver = folder / f"arm-{variant.name}"
    kernel_replay.build_driver([ARM_COMPILER], variant, driver)
    done = _run("qemu-aarch64", "-L", ARM_LIBRARIES, driver, cases, 1)
    _assert_clean(done)
    assert variant.features <= set(done.stdout.splitlines()[0].split())
    # Sums are taken in another order there, so that the comparison itself is seen to work.
    assert _run("qemu-aarch64", "-L", ARM_LIBRARIES, driver, cases, 0).returncode == 1
