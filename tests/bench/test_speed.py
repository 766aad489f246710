"""The speed bench: turns, ratios, unsteady machines, peers that cannot run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from failing_peer import failing_peer
from qwenkit.bench.calibrate import Calibration, Calibrator
from qwenkit.bench.expected import expected
from qwenkit.bench.peers.spec import Options, WeightSetting, Work, prompt_ids
from qwenkit.bench.process import Launch, WorkerProcess
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.bench.report import EngineResult, SpeedReport, Turn
from qwenkit.bench.shapes import shape
from qwenkit.bench.sources import Source
from qwenkit.bench.speed import SpeedSettings, measure_speed
from qwenkit.cli.bench import end_on_sigterm
from qwenkit.cli.bench_options import chosen_peers, weight_setting
from qwenkit.cli.bench_tables import show_speed
from qwenkit.errors import QwenkitError, UsageError

STEADY = Calibration(30.0, 200.0)


def report(
    ours: list[float],
    theirs: list[float],
    after: Calibration = STEADY,
    source: Source | None = None,
) -> SpeedReport:
    def turns(speeds: list[float]) -> dict[str, list[Turn]]:
        return {"prefill": [Turn(s, STEADY, after) for s in speeds]}

    return SpeedReport(
        source=source or Source(model=Path("m.gguf")),
        plan=(Work("prefill", 512), Work("decode", 48)),
        threads=2,
        turns_each=len(ours),
        compute="auto",
        machine="a machine",
        vendor="AuthenticAMD",
        version="0",
        engines=[
            EngineResult("qwenkit", "0", turns=turns(ours)),
            EngineResult("llama.cpp", "1", turns=turns(theirs)),
        ],
    )


def test_a_ratio_is_the_median_over_neighbouring_turns() -> None:
    result = report([100.0, 20.0, 90.0], [50.0, 10.0, 30.0])  # the second pair fell in a slow spell
    assert result.ratio(result.engines[1], "prefill") == 2.0
    assert result.ratio(result.engines[1], "decode") is None
    assert result.engines[0].median("prefill") == 90.0


def test_a_machine_that_moved_is_said() -> None:
    assert report([1.0], [1.0]).unsteady_turns() == 0
    moved = report([1.0], [1.0], after=Calibration(30.0, 170.0))
    assert moved.unsteady_turns() == moved.turn_count() == 2
    assert moved.to_json()["unsteady_turns"] == 2
    json.dumps(moved.to_json(), allow_nan=False)


def test_in_a_narrow_terminal_no_figure_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = [Work("decode", 32, context=n) for n in (512, 2048, 8192, 16384, 32768)]
    plan = (Work("prefill", 512), *contexts)
    figures = {work.name: [Turn(12345.6 + i, STEADY, STEADY)] for i, work in enumerate(plan)}
    engine = EngineResult("onnxruntime-genai", "0.18.0", turns=figures, peak_bytes=10**10)
    ours = EngineResult("qwenkit", "0", turns=figures)
    monkeypatch.setenv("COLUMNS", "80")
    show_speed(replace(report([1.0], [1.0]), plan=plan, engines=[ours, engine]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for i in range(len(plan)):
        assert printed.count(f"{12345.6 + i}") == 2


def test_calibration_reads_positive_rates() -> None:
    reading = Calibrator(threads=1).read()
    assert reading.read_gb_per_s > 0
    assert reading.compute_gflop_per_s > 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "random.gguf"
    small = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
    write_random_gguf(path, shape("qwen2-0.5b") | small)
    return path


def test_our_engine_is_measured_and_a_missing_peer_is_named(tmp_path: Path, model: Path) -> None:
    blocked = tmp_path / "peer-python"
    blocked.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # a Python without packages
    blocked.chmod(0o755)
    seen: list[str] = []
    result = measure_speed(
        SpeedSettings(
            source=Source(model=model),
            cache=tmp_path,
            threads=1,
            prompt_tokens=8,
            decode_tokens=3,
            streams=(2,),
            contexts=(20,),
            turns=2,
            peer_python=str(blocked),
        ),
        progress=lambda what, share: seen.append(what),
    )
    ours, llama, transformers = result.engines
    assert len(ours.turns["prefill"]) == len(ours.turns["decode"]) == 2
    assert list(ours.turns) == ["prefill", "decode", "decode_2_streams", "decode_at_20"]
    assert ours.peak_bytes > 1 << 20
    assert "llama_cpp" in str(llama.error)
    assert transformers.error is not None
    assert "decode, qwenkit" in seen


@pytest.mark.parametrize(
    ("answers", "complete"),
    [(2, []), (3, ["prefill"]), (5, ["prefill"])],
)
def test_a_peer_that_fails_in_a_turn_leaves_the_others_their_figures(
    answers: int, complete: list[str], tmp_path: Path, model: Path
) -> None:
    peer = failing_peer(tmp_path, answers, "raise RuntimeError('out of luck')")
    result = measure_speed(
        SpeedSettings(
            source=Source(model=model),
            cache=tmp_path,
            threads=1,
            prompt_tokens=4,
            decode_tokens=2,
            turns=2,
            peers=("llama.cpp",),
            peer_python=peer,
        )
    )
    ours, theirs = result.engines
    assert ours.error is None
    assert [len(ours.turns[m]) for m in ("prefill", "decode")] == [2, 2]
    assert theirs.version == "1"
    assert theirs.error == "llama.cpp: RuntimeError: out of luck"
    assert {m: len(t) for m, t in theirs.turns.items()} == dict.fromkeys(complete, 2)
    assert (result.ratio(theirs, "prefill") is not None) == bool(complete)
    assert result.ratio(theirs, "decode") is None
    json.dumps(result.to_json(), allow_nan=False)


def test_a_peer_that_ends_without_a_word_or_never_starts_is_named(
    tmp_path: Path, model: Path
) -> None:
    settings = SpeedSettings(
        source=Source(model=model),
        cache=tmp_path,
        threads=1,
        prompt_tokens=4,
        decode_tokens=2,
        turns=1,
        peers=("llama.cpp",),
    )
    silent = failing_peer(tmp_path, 0, "raise SystemExit(3)")
    _, theirs = measure_speed(replace(settings, peer_python=silent)).engines
    assert theirs.error == "llama.cpp: ended with status 3"
    absent = str(tmp_path / "absent")
    ours, theirs = measure_speed(replace(settings, peer_python=absent)).engines
    assert theirs.version is None
    assert absent in str(theirs.error)
    assert ours.median("decode") is not None


def test_what_a_peer_started_ends_with_the_bench(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"import os, subprocess; os.symlink(str(subprocess.Popen(['cat']).pid), {str(pid)!r})"
    starts_one = failing_peer(tmp_path, 0, f"{program}; sys.stdin.read()")
    options = Options(threads=1, most_prompt_tokens=4, most_positions=8)
    worker = WorkerProcess(Launch("llama.cpp", starts_one, tmp_path / "model", options))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"), worker:
            _end_in_time_to_clear_up(pid)
    finally:
        signal.signal(signal.SIGTERM, before)
    status = Path("/proc", os.readlink(pid), "stat")
    while status.exists() and ") Z " not in status.read_text():
        time.sleep(0.01)


def _end_in_time_to_clear_up(started: Path) -> None:
    while not started.is_symlink():
        time.sleep(0.01)
    end_on_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize("vocab_size", [5, 300, 2000, 151936])
def test_prompt_ids_stay_inside_the_vocabulary(vocab_size: int) -> None:
    ids = prompt_ids(2100, vocab_size)
    assert len(ids) == 2100
    assert 0 <= min(ids) <= max(ids) < vocab_size


def test_our_own_failure_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(QwenkitError, match="qwenkit: "):
        measure_speed(
            SpeedSettings(source=Source(model=tmp_path / "broken.gguf"), cache=tmp_path, peers=())
        )


def test_a_peer_below_what_it_is_known_to_reach_makes_its_figure_void() -> None:
    source = Source(shape="qwen2-0.5b", weights=WeightSetting(name="int4", group_size=32))
    good = report([500.0, 500.0], [200.0, 320.0], source=source)  # one good turn is enough
    known = good.expectation(good.engines[1], "prefill")
    assert known is not None
    assert known.table == 339
    assert known.needed == pytest.approx(339 * 200 / 230 * 0.9)
    assert not good.void(good.engines[1], "prefill")
    slow = report([500.0, 500.0], [100.0, 200.0], source=source)
    assert slow.void(slow.engines[1], "prefill")
    assert slow.to_json()["engines"][1]["prefill"]["void"] is True
    assert not slow.void(slow.engines[0], "prefill")  # nothing is known of ours
    lucky = Calibration(30.0, 400.0)  # around a turn of ours, which says nothing of the peer's
    good.engines[0].turns["prefill"].append(Turn(500.0, lucky, lucky))
    assert good.best_calibration() == lucky
    assert not good.void(good.engines[1], "prefill")
    same = expected(
        "onnxruntime",
        "qwen2-0.5b",
        WeightSetting(name="int4", head="int4"),  # which is how it holds the head by itself
        "decode",
        best=Calibration(15.0, 230.0),
        prompt_tokens=512,
        vendor="AuthenticAMD",
    )
    assert same is not None
    assert (same.table, same.scale) == (103.1, 0.5)
    unknown = report([500.0], [1.0])
    assert unknown.expectation(unknown.engines[1], "prefill") is None


def test_weights_are_named_with_their_groups() -> None:
    assert weight_setting(None, 128, None) is None
    given = weight_setting("int4", 32, "int8")
    assert given is not None
    assert given.label == "int4-g32-head-int8"
    for wrong in (("int5", 128, None), ("int4", 100, None), (None, 128, "int8")):
        with pytest.raises(UsageError):
            weight_setting(*wrong)


def test_peers_are_named_or_none() -> None:
    assert chosen_peers(None) == ("llama.cpp", "transformers")
    assert chosen_peers(["none"]) == ()
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        chosen_peers(["llamacpp"])
