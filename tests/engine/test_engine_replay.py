"""Repeated decoding steps: the same bits as computed ones, and only where that holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit import LLM
from qwenkit.engine import replay
from qwenkit.engine.replay import Replayer
from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.replay import NotReplayableError, Program, record
from qwenkit.kernels.ops.silu_mul import silu_mul
from tiny import write_tiny_checkpoint

SAMPLING = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 2}
PROMPTS = [[65 + i, *range(70, 80 + 7 * i)] for i in range(5)]


MIXTURE = {
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


@pytest.fixture(scope="module", params=[{}, MIXTURE], ids=["dense", "mixture"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"intermediate_size": 64} | request.param
    return write_tiny_checkpoint(tmp_path_factory.mktemp("m"), config=config)


@pytest.fixture(params=["auto", "int4", "int8", "bf16"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(folder, weights=request.param) as opened:
        if not silu_mul.backends:
            pytest.skip("no native kernels here")
        yield opened


def answers(llm: LLM) -> list[Any]:
    alone = [llm.generate([p], SAMPLING)[0] for p in PROMPTS]
    together = llm.generate(PROMPTS, SAMPLING)
    return [(c.token_ids, c.logprobs) for c in (*alone, *together)]


def test_repeated_steps_give_the_bits_of_computed_ones(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    repeat = Program.run

    def counted(self: Program) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return repeat(self)

    monkeypatch.setattr(Program, "run", counted)
    repeated = answers(llm)
    assert runs > 5 * 20  # nearly every step of those alone
    assert repeated[:5] == repeated[5:]
    monkeypatch.setattr(Replayer, "run", lambda *_: None)
    assert answers(llm) == repeated


def test_what_is_known_of_steps_does_not_grow_without_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_MOST_SPECS", 3)
    with LLM(folder) as llm:
        if not silu_mul.backends:
            pytest.skip("no native kernels here")
        expected = answers(llm)
        assert answers(llm) == expected
        replayer = llm._service.engine._runner._replayer
        assert replayer is not None
        assert 0 < len(replayer._specs) <= 3


def test_a_program_reads_its_inputs_anew() -> None:
    if not silu_mul.backends:
        pytest.skip("no native kernels here")
    gate, up = torch.randn(2, 64)
    program = record(lambda: silu_mul(gate.view(8, 8)[2:].flatten(), up[16:]))
    assert torch.equal(program.result, silu_mul(gate[16:], up[16:]))
    gate.copy_(torch.randn(64))
    assert torch.equal(program.run(), silu_mul(gate[16:], up[16:]))


def test_what_kernels_do_not_compute_is_refused() -> None:
    x = torch.randn(8)
    for compute in (lambda: x + 1, lambda: x.clone(), lambda: x.mul_(2), lambda: torch.cat((x, x))):
        with pytest.raises(NotReplayableError):
            record(compute)


def test_a_failing_call_is_named(folder: Path) -> None:
    with LLM(folder) as llm:
        if not silu_mul.backends:
            pytest.skip("no native kernels here")
        ids = torch.tensor([1, 2])
        embedding = llm.model.model.embed_tokens  # type: ignore[union-attr]
        with torch.inference_mode():
            program = record(lambda: embedding(ids, torch.float32))
            ids.fill_(10_000_000)
            with pytest.raises(KernelError, match=r"call 1 of 1 \(_PackedRows\) failed"):
                program.run()
