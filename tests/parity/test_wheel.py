"""The wheel, installed as a user would, where there is no compiler: it brings its kernels along.

The environment is a new one that sees the packages of the running one, but not its qwenkit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from tiny import write_tiny_checkpoint

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[2]
PREBUILT = f"qwenkit/kernels/cpu/{build.PREBUILT}/"
NO_COMPILER = {"CXX": "no-compiler-here"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's sources, so that nothing is written beside the real ones."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", build.PREBUILT)
    shutil.copytree(ROOT / "src", folder / "src", ignore=left_out)
    return folder


def _run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(checkout: Path, to: Path, **environment: str) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet")
    _run(sys.executable, "-m", "pip", "wheel", *options, "-w", to, checkout, **environment)
    (wheel,) = to.glob("*.whl")
    return wheel


def _install(wheel: Path, place: Path) -> Path:
    """A new environment's folder of programs."""
    venv.create(place, with_pip=False)
    programs = place / "bin"
    packages = Path(
        _run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        .strip()
    )  # fmt: skip
    command = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet")
    _run(*command, "--no-deps", "--no-index", "--no-cache-dir", wheel)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def _environment(folder: Path) -> dict[str, str]:
    """Where no compiler is found, and nothing that an earlier run left."""
    (folder / "empty").mkdir()
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    return {"PATH": str(folder / "empty"), "CXX": "", "PYTHONPATH": "", **home}


def test_a_wheel_brings_its_kernels_along(checkout: Path, tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except KernelError as error:
        pytest.skip(str(error))
    wheel = _wheel(checkout, tmp_path / "wheel")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    libraries = {
        Path(name).name.rsplit("-", 1)[0]
        for name in zipfile.ZipFile(wheel).namelist()
        if name.startswith(PREBUILT)
    }
    assert {"features", "plain"} < libraries
    assert libraries <= {"features", *(v.name for v in build.VARIANTS)}

    programs, environment = _install(wheel, tmp_path / "venv"), _environment(tmp_path)
    kernels = json.loads(_run(programs / "qwenkit", "doctor", "--json", **environment))["kernels"]
    assert kernels["variant"] in libraries
    assert Path(kernels["library"]).is_relative_to(tmp_path / "venv")
    model = write_tiny_checkpoint(tmp_path / "model")
    command = ("generate", model, "--prompt", "A", "--max-tokens", "4", "--greedy", "--json")
    told = _run(programs / "qwenkit", *command, QWENKIT_KERNELS="native", **environment)
    assert json.loads(told)["usage"]["completion_tokens"] == 4
    assert not list(tmp_path.glob("cache/qwenkit/kernels/*"))


def test_without_a_compiler_the_wheel_is_for_any_machine_and_runs(
    checkout: Path, tmp_path: Path
) -> None:
    wheel = _wheel(checkout, tmp_path / "wheel", **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]

    programs, environment = _install(wheel, tmp_path / "venv"), _environment(tmp_path)
    kernels = json.loads(_run(programs / "qwenkit", "doctor", "--json", **environment))["kernels"]
    assert kernels["variant"] is None
    assert "No C++ compiler found" in kernels["reason"]
    model = write_tiny_checkpoint(tmp_path / "model")
    done = subprocess.run(
        [programs / "qwenkit", "generate", model, "--prompt", "A", "--max-tokens", "4", "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("No C++ compiler found") == 1  # said once, and then it runs
    assert json.loads(done.stdout)["usage"]["completion_tokens"] <= 4


def test_a_source_distribution_holds_the_sources_only(checkout: Path, tmp_path: Path) -> None:
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=checkout, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"setup.py", "features.cpp", "threads.h"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]
