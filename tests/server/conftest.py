"""A tiny checkpoint that is served, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny import write_tiny_checkpoint


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with room for prompts that show tools, one byte a token."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    return write_tiny_checkpoint(folder, config={"max_position_embeddings": 4096})
