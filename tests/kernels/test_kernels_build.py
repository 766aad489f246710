"""Building, keeping and registering the native kernels, and what happens where they cannot be."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build, cpu
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.registry import OPS

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here"
)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing registered, nothing loaded; afterwards everything as it was."""
    monkeypatch.delenv("QWENKIT_KERNELS", raising=False)
    before = {name: dict(op.backends) for name, op in OPS.items()}
    for op in OPS.values():
        op.backends.clear()
    bind._load.cache_clear()
    yield
    bind._load.cache_clear()
    for name, backends in before.items():
        OPS[name].backends.clear()
        OPS[name].backends.update(backends)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@needs_compiler
def test_register_is_idempotent_and_safe_in_threads() -> None:
    found: list[cpu.KernelInfo] = []
    workers = [threading.Thread(target=lambda: found.append(cpu.register())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    info = found[0]
    assert all(other == info for other in found)
    assert info.reason is None
    assert info.variant in {v.name for v in build.VARIANTS}
    assert info.library is not None
    assert info.library.is_file()
    assert info.threads == torch.get_num_threads()
    assert cpu.kernel_info() == info
    kernel = OPS["block_matmul"].backends["cpu"]
    cpu.register()
    assert OPS["block_matmul"].backends["cpu"] is kernel


@needs_compiler
def test_the_best_variant_of_the_features_is_used() -> None:
    info = cpu.register()
    assert info.variant == build.usable_variants(frozenset(info.features))[0].name


def test_every_variant_above_plain_needs_features() -> None:
    assert [v.name for v in build.usable_variants(frozenset())] == ["plain"]
    for variant in build.VARIANTS:
        usable = build.usable_variants(variant.features)
        assert usable[0] == variant
        assert usable[-1].name == "plain"
        assert {v.machine for v in usable} <= {variant.machine, None}


def test_a_platform_has_its_own_variants() -> None:
    assert [v.name for v in build.machine_variants("aarch64")] == ["neon_dotprod", "plain"]
    assert build.machine_variants("arm64") == build.machine_variants("aarch64")
    assert {"avx512", "avx2", "plain"} <= {v.name for v in build.machine_variants("x86_64")}
    assert "neon_dotprod" not in {v.name for v in build.machine_variants("AMD64")}
    assert [v.name for v in build.machine_variants("riscv64")] == ["plain"]


@needs_compiler
def test_a_compiler_that_is_too_old_for_a_variant_builds_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    future = build.Variant("future", ("-mno-such-instructions",), frozenset({"future"}))
    monkeypatch.setattr(build, "VARIANTS", (future, build.VARIANTS[-1]))
    assert build.build_best(frozenset({"future"}))[0].name == "plain"
    monkeypatch.setattr(build, "op_sources", build._probe_sources)  # quick to compile
    built = build.prebuild(tmp_path / "prebuilt")
    assert [path.name.split("-")[0] for path in built] == ["features", "plain"]


@needs_compiler
def test_what_a_package_carries_is_used_as_long_as_it_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(build.SOURCE_FOLDER, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path / "cpu")
    monkeypatch.setattr(build, "op_sources", build._probe_sources)  # quick to compile
    carried = build.prebuild(tmp_path / "cpu" / build.PREBUILT)
    assert build.build_probe() == carried[0]
    assert build.build_variant(build.VARIANTS[-1]) == carried[-1]
    assert bind.open_library(carried[0])
    assert not (tmp_path / "cache").exists()
    with monkeypatch.context() as without:  # needs no compiler
        without.setenv("PATH", str(tmp_path))
        without.delenv("CXX", raising=False)
        assert build.build_best(frozenset()) == (build.VARIANTS[-1], carried[-1])
    assert build.build_variant(build.VARIANTS[-1], extra_flags=("-O1",)) not in carried
    with (tmp_path / "cpu" / "features.cpp").open("a") as file:
        file.write("\n// changed\n")
    assert build.build_probe() not in carried  # of other sources: not used


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        info = cpu.register()
        cpu.register()
    assert len(caplog.records) == 1
    assert "No C++ compiler" in caplog.text
    assert info.variant is None
    assert info.library is None
    assert "No C++ compiler" in (info.reason or "")
    assert not any(op.backends for op in OPS.values())
    x = torch.ones(1, 4)
    assert torch.equal(OPS["silu_mul"](x, x), OPS["silu_mul"].reference(x, x))


@pytest.mark.usefixtures("no_compiler")
def test_native_demanded_but_impossible_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENKIT_KERNELS", "native")
    with pytest.raises(KernelError, match=r"g\+\+"):
        cpu.register()


def test_the_environment_can_ask_for_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QWENKIT_KERNELS", "reference")
    info = cpu.register()
    assert info.variant is None
    assert info.reason == "QWENKIT_KERNELS=reference"
    assert not any(op.backends for op in OPS.values())
    assert not caplog.records


def test_an_unknown_choice_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENKIT_KERNELS", "referense")
    with pytest.raises(KernelError, match="'reference'"):
        cpu.register()


def test_threads_are_one_number_for_torch_and_the_kernels() -> None:
    before = torch.get_num_threads()
    try:
        cpu.set_threads(2)
        assert torch.get_num_threads() == 2
        with pytest.raises(KernelError, match="0"):
            cpu.set_threads(0)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.build_probe()
    assert path.is_relative_to(tmp_path / "qwenkit" / "kernels")
    written = path.stat().st_mtime_ns
    assert build.build_probe() == path
    assert path.stat().st_mtime_ns == written


@needs_compiler
def test_another_source_or_flag_is_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = build.build_probe()
    shutil.copytree(build.SOURCE_FOLDER, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path / "cpu")
    assert build.build_probe() == path  # the same sources elsewhere
    with (tmp_path / "cpu" / "features.cpp").open("a") as file:
        file.write("\n// changed\n")
    assert build.build_probe() != path
    assert build.build_probe().is_file()


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    code = "from qwenkit.kernels.build import build_probe; print(build_probe())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    path = Path(outputs.pop())
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-made is left


@needs_compiler
def test_what_the_compiler_says_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(build.SOURCE_FOLDER, tmp_path / "cpu")
    (tmp_path / "cpu" / "features.cpp").write_text("#error sources are broken here\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path / "cpu")
    with pytest.raises(KernelError, match="sources are broken here"):
        build.build_probe()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_named_in_the_environment_is_the_one_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(KernelError, match="no-such-compiler"):
        build.build_probe()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="XDG_CACHE_HOME"):
        build.build_probe()


@needs_compiler
def test_a_damaged_library_is_reported_and_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(build, "build_best", lambda features: (build.VARIANTS[-1], broken))
    info = cpu.register()
    assert info.variant is None
    assert str(broken) in (info.reason or "")
    assert len(caplog.records) == 1
