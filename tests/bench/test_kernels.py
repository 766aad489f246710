"""The kernel bench: every op is found, calls go through the registry, figures are what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qwenkit.bench import kernel_job
from qwenkit.bench.ceilings import Ceilings
from qwenkit.bench.kernel_job import Job
from qwenkit.bench.kernel_jobs import BUILDERS
from qwenkit.bench.kernels import (
    KernelReport,
    KernelResult,
    KernelSettings,
    all_ops,
    measure_kernels,
)
from qwenkit.cli.bench_tables import show_kernels
from qwenkit.errors import UsageError
from qwenkit.kernels.registry import OPS

CEILINGS = Ceilings(read=20.0, fp32=300.0, int8=1000.0, bf16=None)
SMALL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 320}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_job, "_MOST_COPIES", 2)


def test_every_op_with_a_builder_is_one() -> None:
    assert set(BUILDERS) <= set(all_ops())


@pytest.mark.parametrize("op", BUILDERS)
def test_each_job_runs_and_torch_agrees_on_its_size(op: str) -> None:
    all_ops()
    jobs = list(BUILDERS[op](SMALL, (1, 3)))
    assert {job.rows for job in jobs} == {1, 3}
    for job in jobs:
        assert job.bytes_read > 0
        output = OPS[op](*job.calls[-1])
        if job.torch_calls is not None:
            beside = job.torch_calls[-1]()
            assert output is None or beside.numel() == output.numel(), job.what


def test_a_report_has_figures_shares_and_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qwenkit.bench.kernels.measure_ceilings", lambda threads: CEILINGS)
    settings = KernelSettings(ops=("silu_mul", "block_dequantize"), rows=(1,), threads=1)
    report = measure_kernels(settings)
    assert [r.shape for r in report.results] == ["smollm2-135m", "qwen2-0.5b", "qwen2-1.5b"]
    assert report.not_benched == ("block_dequantize",)
    json.dumps(report.to_json(), allow_nan=False)
    show_kernels(report)
    printed = capsys.readouterr().out
    assert "silu_mul" in printed
    assert "Not benched: block_dequantize." in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_in_a_narrow_terminal_names_fold_and_no_figure_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "int4 group 32, 151936 × 896, rounded twice, with its residual and its norm"
    result = KernelResult(
        op="packed_matmul",
        shape="qwen2-0.5b",
        what=name,
        rows=8192,
        seconds=1.2345678,
        torch_seconds=1234.0,
        bytes_read=10**11,
        operations=10**14,
        kind="int8",
        native=True,
    )
    report = KernelReport(
        machine="m",
        variant="v",
        threads=2,
        ceilings=CEILINGS,
        results=[result],
        not_benched=(),
        failed={},
    )
    monkeypatch.setenv("COLUMNS", "70")
    show_kernels(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 70
    for figure in ("8192", "1234567.8", "81.0", "81000", "8100%", "999.54"):
        assert any(figure in line for line in lines), figure
    assert "…" not in "".join(lines)


def test_an_op_that_breaks_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, rows: tuple[int, ...]) -> Any:
        yield Job(what="x", rows=1, calls=[(torch.ones(1),)], bytes_read=1)

    monkeypatch.setattr("qwenkit.bench.kernels.measure_ceilings", lambda threads: CEILINGS)
    monkeypatch.setitem(BUILDERS, "rotary", broken)
    settings = KernelSettings(ops=("rotary", "silu_mul"), shapes=("qwen2-0.5b",), rows=(1,))
    report = measure_kernels(settings)
    assert report.failed["rotary"].startswith("TypeError")
    assert [r.op for r in report.results] == ["silu_mul"]


def test_shares_are_of_the_nearer_ceiling() -> None:
    def result(bytes_read: int, operations: int, kind: str) -> KernelResult:
        return KernelResult(
            op="o",
            shape="s",
            what="w",
            rows=1,
            seconds=1.0,
            torch_seconds=2.0,
            bytes_read=bytes_read,
            operations=operations,
            kind=kind,
            native=True,
        )

    assert result(10**10, 0, "fp32").share(CEILINGS) == 0.5
    assert result(1, 25 * 10**10, "int8").share(CEILINGS) == 0.25
    assert result(1, 15 * 10**10, "bf16").share(CEILINGS) == 0.5  # no instruction: fp32's
    report = KernelReport(
        machine="m",
        variant="v",
        threads=1,
        ceilings=None,
        results=[result(10, 10, "fp32")],
        not_benched=(),
        failed={},
    )
    assert report.to_json()["results"][0]["share"] is None


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(UsageError, match="rms_norm"):
        measure_kernels(KernelSettings(ops=("rmsnorm",)))
