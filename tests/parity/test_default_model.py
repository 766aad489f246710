"""The embedded default model against transformers and llama.cpp reading the same file."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenkit import LLM
from qwenkit.kernels import cpu
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import PackedCausal

pytestmark = pytest.mark.oracle
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WINDOW_TOKENS = 512
WINDOWS = 10  # of the text's 396; docs/log.md has a longer comparison


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


# llama.cpp runs in a process of its own: its OpenMP runtime and torch's do not share one.
LLAMA_CPP_LOSSES = """
import json, sys
import numpy
from llama_cpp import Llama

windows = json.load(sys.stdin)
llama = Llama(sys.argv[1], n_ctx=len(windows[0]), logits_all=True, n_threads=2, verbose=False)
losses = []
for ids in windows:
    llama.reset()
    llama.eval(ids)
    logits = numpy.array(llama.scores[: len(ids) - 1], dtype=numpy.float64)
    logits -= logits.max(1, keepdims=True)
    chosen = logits[numpy.arange(len(ids) - 1), ids[1:]]
    losses.append(float((numpy.log(numpy.exp(logits).sum(1)) - chosen).mean()))
print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def fast(default_model_path: Path) -> LLM:
    return LLM(default_model_path, threads=2)


@pytest.fixture(scope="module")
def windows(llm: LLM, shared_dir: Path) -> torch.Tensor:
    """The first tokens of a text: [windows, tokens]."""
    rows = (shared_dir / "data" / "tinyshakespeare.jsonl").read_text(encoding="utf-8").splitlines()
    ids = torch.tensor(llm.tokenizer.encode("".join(json.loads(r)["text"] for r in rows)))
    return ids[: WINDOWS * WINDOW_TOKENS].view(WINDOWS, WINDOW_TOKENS)


def test_perplexity_agrees_with_llama_cpp(
    fast: LLM, windows: torch.Tensor, default_model_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-c", LLAMA_CPP_LOSSES, str(default_model_path)]
    given = json.dumps(windows.tolist())
    answer = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    theirs = statistics.mean(json.loads(answer.stdout.splitlines()[-1]))
    ours = statistics.mean(_loss(_logits(fast, window), window) for window in windows)
    assert abs(math.exp(ours - theirs) - 1) < 0.005


def test_rounding_activations_costs_next_to_nothing(
    fast: LLM, llm: LLM, windows: torch.Tensor
) -> None:
    kernels = cpu.register()
    if kernels.variant is None:
        pytest.skip(f"no native kernels here: {kernels.reason}")
    rises, agreements = [], []
    for window in windows[:4]:
        rounded = _logits(fast, window)
        with reference_only():
            exact = _logits(llm, window)
        rises.append(_loss(rounded, window) - _loss(exact, window))
        agreements.append(rounded.argmax(1) == exact.argmax(1))
    assert math.exp(statistics.mean(rises)) - 1 < 0.002, "of perplexity"  # measured: 0.0006
    agreement = torch.cat(agreements).double().mean().item()  # measured: 0.985
    assert 0.98 <= agreement < 1


def _logits(model: LLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.model(ids, PackedCausal([len(ids)]))  # [tokens, vocab]
    return logits


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of each id given those before it."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:]).item()


def test_the_default_model_knows_paris(llm: LLM) -> None:
    completion = llm.chat(QUESTION, {"temperature": 0.0, "max_tokens": 20})
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
