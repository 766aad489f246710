"""What the chat tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from qwenkit.tokenizer import BytePairTokenizer, from_tiktoken


@pytest.fixture(scope="session")
def qwen() -> BytePairTokenizer:
    """The first generation's real vocabulary, which the package dashscope carries."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test extra installs dashscope"
    assert spec.submodule_search_locations is not None
    return from_tiktoken(Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken")
