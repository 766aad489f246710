"""Fixtures shared by every test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from qwenkit.checkpoint.hub import resolve
from qwenkit.errors import ModelNotFoundError, NetworkError

# The same examples in every run, and no clock: a busy machine must not make a test fail.
settings.register_profile("qwenkit", deadline=None, derandomize=True)
settings.load_profile("qwenkit")

# A shell that starts a program behind its back makes it deaf to Ctrl-C, and so all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Golden numbers that other implementations produced, committed with the tests."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of benchmark rows and texts beside a developer's checkout; absent in a user's
    clone.
    """
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (benchmark rows are not part of the repository)")
    return folder


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The embedded default model's GGUF file, fetched once into the user's cache."""
    try:
        return resolve("default")
    except (ModelNotFoundError, NetworkError) as error:
        pytest.skip(f"needs the embedded default model: {error}")
