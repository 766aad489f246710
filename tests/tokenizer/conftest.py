"""Vocabularies that the tokenizer tests share."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from qwenkit.tokenizer import BytePairTokenizer, from_tiktoken
from qwenkit.tokenizer.export import listed_merges

# A busy machine must not fail a test, and the same checkout must give the same result.
settings.register_profile("tokenizer", deadline=None, derandomize=True)
settings.load_profile("tokenizer")

QWEN2_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="session")
def qwen_tiktoken_path() -> Path:
    """The original vocabulary file, which the package dashscope carries; the package itself is not
    imported.
    """
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test extra installs dashscope"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def qwen1(qwen_tiktoken_path: Path) -> BytePairTokenizer:
    """The first generation's tokenizer."""
    return from_tiktoken(qwen_tiktoken_path)


@pytest.fixture(scope="session")
def qwen2(qwen1: BytePairTokenizer) -> BytePairTokenizer:
    """The same merges as Qwen2 publishes them: listed, with its control tokens; two of them, as in
    later releases, not called special.
    """
    vocabulary = qwen1.vocabulary
    regular = len(vocabulary.regular_ids())
    control = {text: regular + i for i, text in enumerate(QWEN2_CONTROL)}
    return BytePairTokenizer(
        replace(
            vocabulary,
            tokens=vocabulary.tokens[:regular] + tuple(t.encode() for t in QWEN2_CONTROL),
            control=control,
            special_ids=frozenset(list(control.values())[:3]),
            merges=listed_merges(qwen1),
            normalization="segments",
            whole_piece_first=False,
        )
    )
