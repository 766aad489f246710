"""Rows 11 to 13 of the promises, on native kernels: whoever runs beside a request, however little
memory there is and however the work is cut, its tokens and log-probabilities are those it has
alone, bit for bit; and everything comes back when requests are cancelled.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.service import EngineService
from qwenkit.engine.settings import EngineSettings
from qwenkit.engine.speculative import Drafter
from qwenkit.errors import RequestError
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels import cpu
from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.load import Loaded, load
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.options import RequestOptions
from qwenkit.types.sampling import SamplingParams
from tiny import write_tiny_checkpoint

BLOCK_TOKENS = 16
CONTEXT = 512
COUNT = 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    cpu.register(threads=1)
    if not silu_mul.backends:
        pytest.skip("no native kernels here")
    folder = write_tiny_checkpoint(
        tmp_path_factory.mktemp("m"), config={"hidden_size": 64, "intermediate_size": 96}
    )
    return load(folder, plan=WeightPlan("int4", 32, None))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def serve(loaded: Loaded, drafter: Drafter | None = None, **settings: Any) -> Engine:
    return Engine(
        loaded.model,
        loaded.tokenizer,
        EngineSettings(**{"block_tokens": BLOCK_TOKENS, **settings}),
        stop_token_ids=(),
        context_tokens=CONTEXT,
        drafter=drafter,
    )


def requests() -> list[Request]:
    """Mixed lengths, parameters, clients and priorities; every third begins as others do."""
    generator = random.Random(7)
    header = generator.choices(range(256), k=100)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        {"temperature": 1.2, "min_p": 0.05, "presence_penalty": 0.5},
    ]
    made = []
    for i in range(COUNT):
        prompt = generator.choices(range(256), k=generator.randint(1, 60))
        prompt = header + prompt[:50] if i % 3 == 0 else prompt
        sampling = SamplingParams(
            **kinds[i % len(kinds)],
            max_tokens=generator.randint(1, 200),
            seed=generator.randrange(2**40),
            logprobs=2,
        )
        options = RequestOptions(client=generator.choice("abc"), priority=generator.randint(0, 1))
        made.append(Request(str(i), tuple(prompt), sampling, options))
    return made


def outputs(served: Engine, given: list[Request]) -> dict[str, list[Any]]:
    """Tokens, log-probabilities and how each ended."""
    for one in given:
        served.add(one)
    said: dict[str, list[Any]] = {one.id: [] for one in given}
    for _ in range(20_000):
        if not served.has_work:
            break
        for event in served.step():
            said[event.request_id].append(facts(event))
    status = served.status()
    assert (status.running, status.waiting) == (0, 0)
    assert status.free_blocks == status.total_blocks
    return said


def facts(event: Event) -> object:
    if isinstance(event, TokenEvent):
        return event.token_id, event.text, event.logprob, event.top_logprobs
    assert isinstance(event, FinishEvent)
    return event.reason, event.text, event.error


class Knowing:
    """Guesses what each request says alone, and every fifth token wrongly."""

    def __init__(self, alone: dict[str, list[Any]], prompts: dict[str, int]) -> None:
        self._said = {name: [fact[0] for fact in facts[:-1]] for name, facts in alone.items()}
        self._prompts = prompts

    def propose(
        self, sequences: Iterable[tuple[str, Sequence[int]]], room: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        drafts = {}
        for name, tokens in sequences:
            start = len(tokens) - self._prompts[name]
            guess = self._said[name][start : start + min(4, room[name])]
            drafts[name] = tuple(t if (start + i) % 5 else 0 for i, t in enumerate(guess))
        return drafts

    def observe(self, request_id: str, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted <= 4

    def forget(self, request_id: str) -> None:
        del self._said[request_id]


@pytest.fixture(scope="module")
def alone(loaded: Loaded) -> dict[str, list[Any]]:
    served = serve(loaded, kv_cache_tokens=CONTEXT, prefix_cache=False)
    return {one.id: outputs(served, [one])[one.id] for one in requests()}


@pytest.mark.parametrize(("chunk", "thread_count"), [(16, 1), (64, 1), (512, 1), (64, 2)])
@pytest.mark.parametrize("guessing", [False, True], ids=["plain", "guessing"])
def test_a_quarter_of_the_memory_changes_no_bit(
    loaded: Loaded,
    alone: dict[str, list[Any]],
    threads: None,
    thread_count: int,
    chunk: int,
    guessing: bool,
) -> None:
    torch.set_num_threads(thread_count)
    given = requests()
    needed = sum(len(one.prompt_ids) + (one.sampling.max_tokens or 0) for one in given)
    served = serve(
        loaded,
        kv_cache_tokens=needed // 4,
        max_batch_tokens=chunk,
        max_sequences=min(chunk, COUNT),
        drafter=Knowing(alone, {r.id: len(r.prompt_ids) for r in given}) if guessing else None,
    )
    assert outputs(served, given) == alone
    status = served.status()
    assert status.cached_tokens > 0
    if chunk > 16:  # of sixteen at a time all fit
        assert status.preemptions > 0
    assert (status.accepted_tokens > 100) == guessing


def test_five_hundred_cancellations_give_everything_back(loaded: Loaded) -> None:
    generator = random.Random(1)
    served = serve(loaded, kv_cache_tokens=4096)
    with EngineService(served) as service:
        streams = []
        for i in range(500):
            prompt = tuple(generator.choices(range(256), k=generator.randint(1, 100)))
            sampling = SamplingParams(max_tokens=200, seed=i)
            stream = service.stream(Request(str(i), prompt, sampling))
            streams.append(stream)
            for _ in range(generator.randint(0, 2) if i % 5 == 0 else 0):
                next(stream)
            if generator.random() < 0.5:
                streams.pop(generator.randrange(len(streams))).close()
        for stream in streams:
            stream.close()
        end_s = time.monotonic() + 2
        while served.has_work and time.monotonic() < end_s:
            time.sleep(0.01)
        status = served.status()
        assert (status.running, status.waiting) == (0, 0)
        assert status.free_blocks == status.total_blocks
        after = Request("after", (1, 2, 3), SamplingParams(max_tokens=3, seed=0))
        assert len(list(service.stream(after))) == 4


def test_an_overdue_request_ends_with_what_it_has(loaded: Loaded) -> None:
    now_s = 100.0
    served = Engine(
        loaded.model,
        loaded.tokenizer,
        EngineSettings(max_sequences=1),
        stop_token_ids=(),
        context_tokens=CONTEXT,
        clock=lambda: now_s,
    )
    sampling = SamplingParams(max_tokens=50, seed=0)
    for name, timeout_s in (("runs", 2.0), ("waits", 1.0), ("patient", None)):
        options = RequestOptions(timeout_s=timeout_s)
        served.add(Request(name, (1, 2, 3), sampling, options))
    events = served.step()
    now_s = 101.0
    events += served.step()
    now_s = 102.5
    events += served.step()
    ends = {e.request_id: e for e in events if isinstance(e, FinishEvent)}
    assert {name: end.reason for name, end in ends.items()} == dict.fromkeys(
        ("runs", "waits"), "timeout"
    )
    assert ends["runs"].usage.completion_tokens == 2
    assert ends["waits"].usage.completion_tokens == 0
    assert served.status().running == 1


def attack(generator: random.Random, name: str) -> Request:
    """A request that is refused, or strange."""
    prompt = tuple(generator.choices(range(-3, 470), k=generator.randint(0, 80)))
    extremes = {
        "temperature": generator.choice((0, 1e-6, 100.0)),
        "repetition_penalty": generator.choice((1e-6, 1.0, 100.0)),
        "presence_penalty": generator.choice((-100.0, 0.0, 100.0)),
        "frequency_penalty": generator.choice((-100.0, 0.0, 100.0)),
        "top_p": generator.choice((0.0, 1.0)),
        "min_p": generator.choice((0.0, 1.0)),
        "logit_bias": {generator.randint(0, 600): generator.choice((-100, 100, 1e308))},
        "logprobs": generator.choice((None, 0, 500)),
        "stop_token_ids": (generator.randint(0, 600),),
        "stop": ("", "a", "\x00")[generator.randint(0, 2)],
        "min_tokens": generator.randint(0, 30),
        "max_tokens": generator.randint(1, 60),
    }
    keys = generator.sample(sorted(extremes), generator.randint(1, 6))
    sampling = SamplingParams.from_mapping(
        {"seed": 1, "max_tokens": 60} | {key: extremes[key] for key in keys}
    )
    options = RequestOptions(
        client=generator.choice(("attacker", "a")), priority=generator.randint(-1, 1)
    )
    return Request(name, prompt, sampling, options)


@pytest.mark.parametrize("seed", range(3))
def test_three_hundred_attackers_change_no_bit_of_eight_victims(
    loaded: Loaded, alone: dict[str, list[Any]], seed: int
) -> None:
    generator = random.Random(seed)
    victims = requests()[seed * 8 : seed * 8 + 8]
    served = serve(loaded, kv_cache_tokens=2048, max_batch_tokens=64, max_sequences=16)
    said: dict[str, list[Any]] = {one.id: [] for one in victims}
    refused = aborted = 0
    for number in range(300):
        if number % 36 == 0 and number < 288:
            served.add(victims[number // 36])
        try:
            served.add(attack(generator, f"attacker {number}"))
        except RequestError:
            refused += 1
        if number % 3 == 0:
            aborted += served.abort(f"attacker {generator.randint(0, number)}") is not None
        for event in served.step():
            if event.request_id in said:
                said[event.request_id].append(facts(event))
    for _ in range(20_000):
        if not served.has_work:
            break
        for event in served.step():
            if event.request_id in said:
                said[event.request_id].append(facts(event))
    assert said == {name: alone[name] for name in said}
    assert refused > 30
    assert aborted > 10
    assert served.status().free_blocks == served.status().total_blocks
