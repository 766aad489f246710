"""The embedded default model against transformers and llama.cpp reading the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwenkit import LLM
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import PackedCausal

pytestmark = pytest.mark.oracle
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WINDOW_TOKENS = 512


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path, compute="reference")


def test_logits_agree_with_transformers(llm: LLM, default_model_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, dtype=torch.float32
    )
    text = "The Eiffel Tower is in Paris. 北京是中国的首都。 def add(a, b):\n    return a + b\n"
    ids = torch.tensor([*llm.render(QUESTION).ids, *llm.tokenizer.encode(text)])
    with torch.no_grad(), reference_only():
        got = llm.model(ids, PackedCausal([len(ids)]))  # [tokens, vocab]
        expected = theirs(ids[None]).logits[0]  # [tokens, vocab]
    span = (expected.max() - expected.min()).item()
    assert (got - expected).abs().max().item() < 1e-3 * span


@pytest.mark.parametrize("compute", ["auto", "reference"])
def test_perplexity_agrees_with_llama_cpp(
    compute: str, default_model_path: Path, shared_dir: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = LLM(default_model_path, compute=compute, threads=2)
    rows = (shared_dir / "data" / "tinyshakespeare.jsonl").read_text(encoding="utf-8").splitlines()
    ids = torch.tensor(ours.tokenizer.encode("".join(json.loads(r)["text"] for r in rows[:8])))
    windows = ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)[:6]
    theirs = llama_cpp.Llama(
        str(default_model_path), n_ctx=WINDOW_TOKENS, logits_all=True, n_threads=2, verbose=False
    )
    our_loss, their_loss = 0.0, 0.0
    for window in windows:
        with torch.inference_mode():
            logits = ours.model(window, PackedCausal([WINDOW_TOKENS]))  # [window, vocab]
        our_loss += _loss(logits, window)
        theirs.reset()
        theirs.eval(window.tolist())
        their_loss += _loss(torch.tensor(theirs.scores[:WINDOW_TOKENS]), window)
    ratio = torch.tensor((our_loss - their_loss) / len(windows)).exp().item()
    assert abs(ratio - 1) < 0.005


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of each id given those before it."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:]).item()


def test_the_default_model_knows_paris(llm: LLM) -> None:
    completion = llm.chat(QUESTION, {"temperature": 0.0, "max_tokens": 20})
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
