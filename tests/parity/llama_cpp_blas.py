"""llama.cpp with exact products: its BLAS backend beside the wheel, in a process of its own.

On a processor llama.cpp rounds activations to eight bits before it multiplies quantized weights
with them. Its BLAS backend, which the wheel lacks, makes fp32 of the weights instead, where 32
tokens or more are computed at once. It is one file of the sources of llama-cpp-python: they are
fetched and the file is compiled once, and kept in the user's cache.

As a program: without arguments makes the library, with FILE, OUT and ids writes logits to OUT.npy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

FETCH = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-DGGML_BACKEND_DL", "-DGGML_BLAS_USE_OPENBLAS")
# The names that the package scipy-openblas32 has for what ggml-blas.cpp calls.
NAMES = [f"-D{name}=scipy_{name}" for name in ("cblas_sgemm", "openblas_set_num_threads")]
WANTED = re.compile(r".*/llama\.cpp/ggml/((include|src)/[^/]+\.h|src/ggml-blas/ggml-blas\.cpp)")


def blas_backend() -> Path:
    """The backend's library. Raises OSError or CalledProcessError where it cannot be made."""
    versions = [metadata.version(name) for name in ("llama-cpp-python", "scipy-openblas32")]
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "qwenkit" / "ggml-blas"
    library = folder / f"{'-'.join([*versions, platform.machine()])}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = _compile(_sources(versions[0], Path(place)), Path(place) / library.name)
            made.replace(library)
    return library


def _run(*command: str | Path) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=600)


def _sources(version: str, place: Path) -> Path:
    """The backend's source, beside the headers that it reads, as this version has them."""
    name = "llama-cpp-python"
    _run(sys.executable, *FETCH, "--no-binary", name, "--dest", place, f"{name}=={version}")
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if WANTED.fullmatch(member.name):
                data = tar.extractfile(member)
                assert data is not None
                (place / Path(member.name).name).write_bytes(data.read())
    return place / "ggml-blas.cpp"


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _compile(source: Path, library: Path) -> Path:
    blas = _folder("scipy_openblas32")
    headers = [f"-I{folder}" for folder in (source.parent, blas / "include")]
    places = [f"-L{folder / 'lib'}" for folder in (_folder("llama_cpp"), blas)]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    linked = (*places, "-lggml-base", "-lscipy_openblas")
    _run(*compiler, *FLAGS, *NAMES, *headers, source, "-o", library, *linked)
    return library


def exact_logits(file: Path, out: Path, ids: list[int]) -> Path:
    """llama.cpp's logits of every position, in `out`, computed in another process."""
    blas_backend()
    _run(sys.executable, __file__, file, out, *map(str, ids))
    return out


def _write_logits(file: str, out: str, ids: list[int]) -> None:
    import llama_cpp
    import numpy as np
    from llama_cpp.llama_cpp import _lib

    # What the backend is linked to is found by name among the libraries that are loaded.
    ctypes.CDLL(str(next((_folder("scipy_openblas32") / "lib").glob("libscipy_openblas*"))))
    register = _lib.ggml_backend_load  # that of the libggml that libllama is linked to
    register.restype = ctypes.c_void_p
    assert register(str(blas_backend()).encode())

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def unpacked() -> llama_cpp.llama_cpp.llama_model_params:
        """Weights as the file has them: what the CPU backend repacks, it alone can multiply."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = unpacked
    model = llama_cpp.Llama(
        file, n_ctx=len(ids), n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=0, type_v=0,
    )  # fmt: skip
    model.eval(ids)
    np.save(out, model.scores[: len(ids)])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        blas_backend()
    else:
        _write_logits(sys.argv[1], sys.argv[2], [int(number) for number in sys.argv[3:]])
