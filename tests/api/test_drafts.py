"""Guessing through the door: the same answers, and what cannot guess is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from qwenkit import LLM
from qwenkit.errors import UsageError
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

PROMPTS = [[65 + i, *range(70, 80 + 7 * i), 65 + i, *range(70, 75)] for i in range(6)]
SAMPLING = {"max_tokens": 40, "seed": 1, "temperature": 0.5, "logprobs": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"intermediate_size": 64, "num_hidden_layers": 12}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("m"), config=config)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a quarter of the size, mostly wrong."""
    config = CONFIG | {"intermediate_size": 64, "num_hidden_layers": 1}
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("d"), config=config, tensors=tiny_tensors(config, seed=5)
    )


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
def test_the_output_is_the_same_bits(folder: Path, draft: Path, weights: str) -> None:
    given = {**SAMPLING, "temperature": 0}
    with LLM(folder, weights=weights) as plain:
        expected = [plain.generate(PROMPTS, each) for each in (SAMPLING, given)]
    for options in ({"speculation": "prompt-lookup"}, {"draft": draft}):
        with LLM(folder, weights=weights, **options) as llm:
            found = [llm.generate(PROMPTS, each) for each in (SAMPLING, given)]
            alone = [llm.generate([prompt], given)[0] for prompt in PROMPTS]
            status = llm._service.engine.status()
        for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.text == theirs.text
            assert ours.logprobs == theirs.logprobs
        assert [one.token_ids for one in alone] == [one.token_ids for one in expected[1]]
        assert status.drafted_tokens > 0


def test_what_cannot_guess_is_refused(folder: Path, draft: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drop one"):  # known before anything is looked for
        LLM(tmp_path / "nowhere", draft=draft, speculation="prompt-lookup")
    with pytest.raises(UsageError, match="prompt-lookup"):
        LLM(folder, speculation="lookup")
    other = write_tiny_checkpoint(tmp_path / "other")
    lines = (other / "qwen.tiktoken").read_text().splitlines()
    first, second = (line.split()[0] for line in lines[:2])
    swapped = [f"{second} 0", f"{first} 1", *lines[2:]]
    (other / "qwen.tiktoken").write_text("\n".join(swapped) + "\n")
    with pytest.raises(UsageError, match=r"token 0 of .*same vocabulary"):
        LLM(folder, draft=other)
    joined = base64.b64encode(b"ab").decode()
    (other / "qwen.tiktoken").write_text("\n".join([*lines, f"{joined} 256"]) + "\n")
    with pytest.raises(UsageError, match="465 tokens, the model 464"):
        LLM(folder, draft=other)
