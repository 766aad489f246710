"""The serving bench: loads, how peers play them, its own parts, and the command."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from failing_peer import failing_peer
from qwenkit.api import LLM
from qwenkit.bench.peers.playing import Entry, play_in_batches, play_in_slots
from qwenkit.bench.peers.spec import Arrival, Load, Options, prompt_ids
from qwenkit.bench.report import EngineResult
from qwenkit.bench.serving import ServingSettings, measure_serving, run_task
from qwenkit.bench.serving_load import LoadResult, LoadSettings, Percentiles, measure_load
from qwenkit.bench.serving_overhead import measure_overhead
from qwenkit.bench.serving_worker import Task, samplings
from qwenkit.bench.serving_workloads import PrefixWorkload, compare_lookup, compare_prefix
from qwenkit.bench.sources import Source
from qwenkit.bench.speed import SpeedSettings
from qwenkit.cli.main import app
from qwenkit.engine.scheduler import Scheduler
from qwenkit.errors import QwenkitError, UsageError
from qwenkit.kernels.cpu import kernel_info
from qwenkit.types.sampling import SamplingParams
from tiny import CONFIG, write_tiny_checkpoint

SMALL = PrefixWorkload(header_tokens=40, questions=3, question_tokens=4, answer_tokens=3)
LOAD = Load((Arrival(0.0, 5, 3), Arrival(0.5, 2, 1), Arrival(1.0, 9, 4), Arrival(9.0, 1, 2)))


class Machine:
    """A clock, and an engine whose every call takes a second and names the token after its ids."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.held: dict[int, list[int]] = {}
        self.calls: list[list[Entry]] = []
        self.released: list[int] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def decode(self, entries: list[Entry]) -> list[int]:
        self.now_s += 1
        self.calls.append(entries)
        chosen = []
        for token_id, position, slot, wanted in entries:
            held = self.held.setdefault(slot, [])
            assert position == len(held)
            held.append(token_id)
            if wanted:
                chosen.append(sum(held) % 50)
        return chosen

    def release(self, slot: int) -> None:
        self.released.append(slot)
        del self.held[slot]


def play(machine: Machine, load: Load, **sizes: int) -> list[list[float]]:
    return play_in_slots(
        load,
        machine.decode,
        machine.release,
        **{"slots": 2, "step_tokens": 6, **sizes},
        vocab_size=100,
        clock=machine.clock,
        sleep=machine.sleep,
    )


def test_slots_are_filled_as_requests_come_and_go() -> None:
    machine = Machine()
    times = play(machine, LOAD)
    assert times[0] == [1.0, 2.0, 3.0]  # alone, then with the next one's prompt
    assert times[1] == [2.0]
    assert times[2] == [4.0, 5.0, 6.0, 7.0]  # its prompt of nine beside a decode, in two steps
    assert times[3] == [10.0, 11.0]
    assert all(len(entries) <= 6 for entries in machine.calls)
    assert sorted(machine.released) == [0, 0, 1, 1]
    assert not machine.held


def test_one_slot_serves_one_after_another() -> None:
    machine = Machine()
    times = play(machine, LOAD, slots=1, step_tokens=100)
    assert [own[0] for own in times] == [1.0, 4.0, 5.0, 10.0]
    first = [entry[0] for entry in machine.calls[0]]
    assert first == prompt_ids(5, 100, 0)


def test_a_batch_lasts_as_long_as_its_longest_request() -> None:
    machine = Machine()
    begun: list[list[list[int]]] = []

    def begin(prompts: list[list[int]]) -> None:
        begun.append(prompts)
        machine.now_s += 1

    times = play_in_batches(
        LOAD,
        begin,
        lambda: machine.sleep(1),
        most=2,
        vocab_size=100,
        clock=machine.clock,
        sleep=machine.sleep,
    )
    assert times == [[1, 2, 3], [4], [4, 5, 6, 7], [10, 11]]
    assert [[len(ids) for ids in prompts] for prompts in begun] == [[5], [2, 9], [1]]


def test_loads_are_seeded_and_have_the_lengths_and_the_rate_that_were_asked_for() -> None:
    settings = LoadSettings(rate=4.0, requests=2000, prompt_tokens=(8, 64), answer_tokens=(2, 9))
    load = settings.load(1)
    assert load == settings.load(1) != settings.load(2)
    assert load == replace(settings, seed=-1).load(2)  # the seed and the turn add up
    assert Load.from_json(json.loads(json.dumps(load.to_json()))) == load
    prompts = [arrival.prompt_tokens for arrival in load.arrivals]
    answers = [arrival.tokens for arrival in load.arrivals]
    assert (min(prompts), max(prompts)) == (8, 64)
    assert (min(answers), max(answers)) == (2, 9)
    assert statistics.median(prompts) == pytest.approx((8 * 65) ** 0.5, rel=0.1)
    assert load.arrivals[-1].at_s == pytest.approx(500, rel=0.1)
    assert load.arrivals[0].at_s == 0
    warm = settings.load(0)
    assert [arrival.at_s for arrival in warm.arrivals] == [0.0] * 8
    with pytest.raises(UsageError, match=r"^rate: "):
        LoadSettings(rate=0.0)


def test_waits_count_from_arrival_and_percentiles_are_ranks() -> None:
    result = LoadResult(EngineResult("e", "1"))
    load = Load((Arrival(1.0, 4, 3), Arrival(2.0, 4, 1)))
    result.add(load, [[1.5, 2.0, 4.0], [3.0]])
    assert result.first_s == [0.5, 1.0]
    assert result.between_s == [0.5, 2.0]
    assert result.median_speed() == 1.0
    assert Percentiles.of([4.0, 1.0, 3.0, 2.0]) == Percentiles(2.0, 4.0)
    assert Percentiles.of(list(range(200))) == Percentiles(99, 197)
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(QwenkitError, match="a request for 3 tokens got 1"):
        result.add(load, [[1.0], [2.0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIG | {"max_position_embeddings": 2048}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("serving") / "tiny", config=config)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(folder, threads=1, weights="int8", group_size=32) as model:
        yield model


needs_kernels = pytest.mark.skipif(kernel_info().variant is None, reason="no native kernels here")


@needs_kernels
def test_the_parts_of_a_step_add_up(llm: LLM) -> None:
    before = Scheduler.schedule
    result = measure_overhead(llm, "greedy", SamplingParams(temperature=0), streams=3, steps=5)
    assert Scheduler.schedule is before  # nothing is left watched
    assert (result.steps, result.streams, result.vocab_rows) == (5, 3, 480)
    assert result.alone_ms > 0
    assert 0 < result.kernels_ms < result.step_ms
    assert min(result.scheduling_ms, result.sampling_ms, result.text_ms) > 0
    assert result.kept > 0
    json.dumps(result.to_json(), allow_nan=False)


def test_the_prefix_cache_is_compared_on_the_same_answers(llm: LLM) -> None:
    said: list[str] = []
    result = compare_prefix(llm, SMALL, turns=2, say=said.append)
    assert (result.requests, result.prompt_tokens, result.answer_tokens) == (3, 132, 9)
    assert len(result.without_s) == len(result.with_s) == 2
    assert result.share == pytest.approx(2 * 32 / 132)  # two blocks each of all but the first
    assert len(said) == 2


def test_prompt_lookup_is_compared_on_the_committed_workload(llm: LLM) -> None:
    edits, writing = compare_lookup(llm, turns=1, say=lambda what: None)
    assert edits.requests == 12
    assert writing.requests == 6
    assert writing.answer_tokens == 6 * 128
    assert 0 <= writing.share <= 1


def test_a_task_runs_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    task = Task(part="prefix", model=str(folder), threads=1, turns=1, prefix=SMALL)
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    said: list[str] = []
    (result,) = run_task(task, said.append)
    assert result["answer_tokens"] == 9
    assert "prefix cache, turn 1 of 1" in said
    with pytest.raises(QwenkitError, match=r"^prefix: .*absent"):
        run_task(replace(task, model=str(tmp_path / "absent.gguf")), said.append)


def test_greedy_is_measured_beside_the_models_own_sampling() -> None:
    own = SamplingParams(temperature=0.2, top_p=0.9)
    assert list(samplings(own)) == ["greedy", "temperature 0.2, top_p 0.9"]
    name = list(samplings(SamplingParams(temperature=0.0)))[1]
    assert name == "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.1"


def settings_for(folder: Path, cache: Path, **changes: Any) -> SpeedSettings:
    given = {"source": Source(model=folder), "cache": cache, "threads": 1, "turns": 1, "peers": ()}
    return SpeedSettings(**{"decode_tokens": 3, **given, **changes})


def test_our_engine_is_given_a_load_and_a_failing_peer_is_named(
    folder: Path, tmp_path: Path
) -> None:
    peer = failing_peer(tmp_path, 0, "raise RuntimeError('out of luck')")
    gguf = settings_for(folder, tmp_path, peers=("transformers",), peer_python=peer)
    load = LoadSettings(
        rate=200.0, requests=5, prompt_tokens=(2, 9), answer_tokens=(1, 4), streams=2, turns=2
    )
    ours, theirs = measure_load(gguf, load, progress=lambda what, share: None)
    assert len(ours.first_s) == 2 * 5
    assert min(ours.first_s) > 0
    asked = [arrival.tokens for turn in (1, 2) for arrival in load.load(turn).arrivals]
    assert len(ours.between_s) == sum(asked) - len(asked)
    assert theirs.engine.error == "transformers: RuntimeError: out of luck"
    assert theirs.median_speed() is None
    json.dumps([ours.to_json(), theirs.to_json()], allow_nan=False)


def test_a_report_has_the_parts_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    settings = ServingSettings(
        speed=settings_for(folder, tmp_path),
        load=LoadSettings(requests=2),
        parts=("decode", "prefix"),
        streams=2,
        prefix=SMALL,
    )
    seen: list[tuple[str, float]] = []
    data = measure_serving(settings, progress=lambda *step: seen.append(step)).to_json()
    json.dumps(data, allow_nan=False)
    assert data["prefix"][0]["answer_tokens"] == 9
    assert list(data["decode"]["engines"][0]["decode_2_streams"])
    assert "prefill" not in data["decode"]["engines"][0]
    assert data["load"] == []
    assert "lookup" not in data
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    with pytest.raises(UsageError, match=r"^part: got 'speed'"):
        replace(settings, parts=("speed",))  # type: ignore[arg-type]
    shape = replace(settings.speed, source=Source(shape="qwen2-0.5b"))
    with pytest.raises(UsageError, match="'lookup' needs a model that can copy"):
        replace(settings, speed=shape, parts=("lookup",))


@needs_kernels
def test_the_command_prints_tables_or_json(folder: Path) -> None:
    command = ["bench", "serving", str(folder), "--peer", "none", "--threads", "1", "--turns", "1"]
    command += ["--weights", "int8", "--group-size", "32", "--streams", "2"]
    small = ["--part", "overhead", "--part", "load", "--requests", "2", "--rate", "50"]
    result = CliRunner().invoke(app, [*command, *small])
    assert result.exit_code == 0, result.output
    assert "480 logits each" in result.stdout
    assert "first p99" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    data = CliRunner().invoke(app, [*command, "--part", "lookup", "--json"])
    assert data.exit_code == 0, data.output
    assert [row["what"] for row in json.loads(data.stdout)["lookup"]] == [
        "prompt lookup, code edits",
        "prompt lookup, writing",
    ]
    wrong = CliRunner().invoke(app, [*command, "--part", "decod"])
    assert wrong.exit_code != 0
    assert "decode" in str(wrong.exception) + wrong.output


def test_options_say_that_an_engine_serves() -> None:
    options = Options(threads=1, most_prompt_tokens=1, most_positions=2, serves=True)
    assert Options.from_json(options.to_json()) == options
