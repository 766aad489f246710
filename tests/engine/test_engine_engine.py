"""Requests to events, with a real tiny model: sameness in any company, stops, faults, aborts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from serving import MODEL, Wrapped, engine, finish, request, run, text, tokens

from fakes import END, EOS, ByteStream, ByteTokenizer
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.errors import RequestError
from qwenkit.kernels import registry
from qwenkit.layers.attention import PackedCausal
from qwenkit.models import qwen2
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.options import RequestOptions


def greedy(model: qwen2.Model, prompt: Iterable[int], count: int) -> list[int]:
    """The whole forward again for every token: nothing kept, nothing paged."""
    ids = list(prompt)
    start = len(ids)
    for _ in range(count):
        logits = model(torch.tensor(ids), PackedCausal([len(ids)]))
        ids.append(int(logits[-1, :258].argmax()))
    return ids[start:]


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Requests of all lengths and with all kinds of parameters, each with its own seed."""
    generator = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.5},
        {"temperature": 0.9, "stop": ("\n",), "frequency_penalty": 0.3, "min_tokens": 5},
    ]
    return [
        request(
            str(i),
            generator.choices(range(256), k=generator.randint(1, 60)),
            **generator.choice(kinds),
            seed=generator.randrange(2**63),
            max_tokens=generator.randint(5, 24),
            ignore_eos=True,
            logprobs=2,
        )
        for i in range(count)
    ]


def same(ours: list[Event], alone: list[Event]) -> None:
    """The same tokens, text and ending, and the same log-probabilities; whatever was cached."""
    assert tokens(ours) == tokens(alone)
    assert [event.text for event in ours] == [event.text for event in alone]
    for field in ("reason", "text", "matched_stop", "error"):
        assert getattr(finish(ours), field) == getattr(finish(alone), field)
    for mine, other in zip(ours[:-1], alone[:-1], strict=True):
        assert isinstance(mine, TokenEvent)
        assert isinstance(other, TokenEvent)
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-6)
        assert [i for i, _ in mine.top_logprobs or ()] == [i for i, _ in other.top_logprobs or ()]


@pytest.fixture(scope="module")
def alone() -> tuple[list[Request], dict[str, list[Event]]]:
    """64 mixed requests and what each gives when it is the only one."""
    requests = mixed_requests(64)
    served = engine()
    return requests, {one.id: run(served, one)[one.id] for one in requests}


def test_greedy_tokens_are_those_of_the_plain_forward() -> None:
    prompt = b"The capital of France"
    events = run(engine(), request("a", prompt, max_tokens=30, ignore_eos=True))["a"]
    assert tokens(events) == greedy(MODEL, prompt, 30)
    assert finish(events).reason == "length"
    assert text(events) == ByteTokenizer().decode(tokens(events))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_tokens": 16, "max_sequences": 16},
        {"max_batch_tokens": 64},
        {"max_sequences": 3, "max_batch_tokens": 7, "block_tokens": 16},
        {"max_sequences": 1, "max_batch_tokens": 1, "block_tokens": 1},
    ],
    ids=str,
)
def test_a_request_gives_the_same_tokens_in_any_batch_and_any_chunking(
    settings: dict[str, Any], alone: tuple[list[Request], dict[str, list[Event]]]
) -> None:
    requests, expected = alone
    for name, events in run(engine(**settings), *requests).items():
        same(events, expected[name])


def test_a_quarter_of_the_memory_gives_the_same_tokens_too(
    alone: tuple[list[Request], dict[str, list[Event]]],
) -> None:
    requests, expected = alone
    demand = sum(len(r.prompt_ids) + len(tokens(expected[r.id])) for r in requests)
    served = engine(kv_cache_tokens=demand // 4)
    for name, events in run(served, *requests).items():
        same(events, expected[name])
    tight = engine(kv_cache_tokens=132, max_batch_tokens=256)
    for name, events in run(tight, *requests).items():
        same(events, expected[name])
    assert tight.status().preemptions > 0


def test_arrivals_and_aborts_of_others_change_nothing(
    alone: tuple[list[Request], dict[str, list[Event]]],
) -> None:
    """Row 11: victims beside attackers that come and go; row 12: everything returns."""
    requests, expected = alone
    generator = random.Random(5)
    served = engine(kv_cache_tokens=600, max_batch_tokens=48, max_sequences=12)
    events: dict[str, list[Event]] = {one.id: [] for one in requests[:8]}
    attackers = [
        dataclasses.replace(one, id=f"attacker {i}")
        for i, one in enumerate(mixed_requests(300, seed=1))
    ]
    victims = list(requests[:8])
    live: list[str] = []
    while served.has_work or victims or attackers:
        if victims and generator.random() < 0.1:
            served.add(victims.pop())
        for _ in range(generator.randint(0, 3)):
            if attackers:
                live.append(served.add(attackers.pop()).id)
        if live and generator.random() < 0.5:
            gone = served.abort(live.pop(generator.randrange(len(live))))
            assert gone is None or gone.reason == "abort"
        for event in served.step():
            if event.request_id in events:
                events[event.request_id].append(event)
    for name, mine in events.items():
        same(mine, expected[name])
    assert served.status().free_blocks == served.status().total_blocks


def test_an_abort_frees_the_blocks_at_once_wherever_the_request_is() -> None:
    served = engine(max_batch_tokens=8, max_sequences=2)
    total = served.status().total_blocks
    served.add(request("prefill", "x" * 100))
    served.add(request("short", "abc", ignore_eos=True))
    served.add(request("waiting", "abc"))
    served.step()
    assert (served.status().running, served.status().waiting) == (1, 2)
    for name in ("prefill", "waiting"):
        event = served.abort(name)
        assert event is not None
        assert (event.reason, event.usage.completion_tokens) == ("abort", 0)
    assert served.status().free_blocks == total
    assert served.abort("prefill") is None
    assert served.abort("never seen") is None
    count = sum(isinstance(event, TokenEvent) for _ in range(5) for event in served.step())
    event = served.abort("short")
    assert event is not None
    assert event.usage.completion_tokens == count == 5
    assert not served.has_work
    assert served.step() == []
    assert served.status().free_blocks == total


def forced(*ids: int, then: int = ord(".")) -> Wrapped:
    """A model that says `ids` one after another, whatever the prompt (of one sequence)."""
    said = iter(ids)

    def change(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -5.0).index_fill(1, torch.tensor([next(said, then)]), 5.0)

    return Wrapped(change)


def test_the_models_stop_token_ends_the_output_and_shows_nothing() -> None:
    events = run(engine(forced(*b"Paris", EOS)), request("a"))["a"]
    assert text(events) == "Paris"
    assert tokens(events) == [*b"Paris", EOS]
    assert (finish(events).reason, finish(events).matched_stop) == ("stop", EOS)
    events = run(engine(forced(*b"Paris", EOS)), request("a", ignore_eos=True, max_tokens=8))["a"]
    assert (text(events), finish(events).reason) == ("Paris..", "length")


def test_stop_strings_ids_and_control_names_of_the_request() -> None:
    said = (*"a😀b\nUser: hi".encode(),)
    events = run(engine(forced(*said)), request("a", stop=("\nUser:",)))["a"]
    assert (text(events), finish(events).matched_stop) == ("a😀b", "\nUser:")
    assert all(not event.text.startswith("\n") for event in events)
    events = run(engine(forced(*said)), request("a", stop_token_ids=(ord("b"),)))["a"]
    assert (text(events), finish(events).matched_stop) == ("a😀", ord("b"))
    events = run(engine(forced(*b"ab", END)), request("a", stop=("<end>",)))["a"]
    assert (text(events), finish(events).matched_stop) == ("ab", "<end>")
    events = run(engine(forced(*b"ab", END, *b"c")), request("a", max_tokens=4))["a"]
    assert text(events) == "abc"


def test_an_output_ends_where_the_context_does() -> None:
    events = run(engine(forced()), request("a", "x" * 250, max_tokens=100))["a"]
    assert (len(tokens(events)), finish(events).reason) == (6, "length")
    served = engine(forced(), kv_cache_tokens=32)
    events = run(served, request("a", "x" * 20))["a"]
    assert len(tokens(events)) == 12


def test_padded_rows_are_never_sampled() -> None:
    loud = Wrapped(lambda _, logits: logits.index_fill(1, torch.arange(258, 272), 100.0))
    for sampling in ({"temperature": 0}, {"temperature": 2.0}):
        events = run(engine(loud), request("a", max_tokens=50, ignore_eos=True, **sampling))["a"]
        assert max(tokens(events)) < 258


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_end_their_own_request_only(bad: float) -> None:
    """Row 21: the row of whoever says "!" is spoiled; the others' tokens are as ever."""

    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == len(logits):  # everybody decodes
            logits = logits.clone()
            logits[ids == ord("!"), 3] = bad
        return logits

    victims = [request(str(i), f"{i}. victim", max_tokens=20, ignore_eos=True) for i in range(3)]
    expected = {one.id: run(engine(), one)[one.id] for one in victims}
    served = engine(Wrapped(spoil), max_sequences=8)
    attacker = request("bad", "attacker", ignore_eos=True)
    for one in (attacker, *victims):
        served.add(one)
    first = served.step()
    served._scheduler._sequences["bad"].tokens[-1] = ord("!")  # what it "said" last
    events: dict[str, list[Event]] = {one.id: [] for one in (attacker, *victims)}
    for event in first:
        events[event.request_id].append(event)
    while served.has_work:
        for event in served.step():
            events[event.request_id].append(event)
    failed = finish(events["bad"])
    assert failed.reason == "error"
    assert failed.error is not None
    assert "1 of the model's 272 logits for output token 1 are NaN or infinite" in failed.error
    assert len(tokens(events["bad"])) == 1
    for one in victims:
        assert tokens(events[one.id]) == tokens(expected[one.id])
    assert served.status().free_blocks == served.status().total_blocks


class BrokenStream(ByteStream):
    """Cannot decode "!", and then not even finish."""

    broken = False

    def push(self, token_id: int) -> str:
        self.broken = token_id == ord("!")
        if self.broken:
            raise ValueError("no such token")
        return super().push(token_id)

    def finish(self) -> str:
        if self.broken:
            raise ValueError("no such ending")
        return super().finish()


class BrokenTokenizer(ByteTokenizer):
    def stream(self, *, skip_special: bool = True) -> ByteStream:
        return BrokenStream()


def test_a_fault_in_one_requests_text_ends_that_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = engine(forced(*b"ab!cd"), BrokenTokenizer())
    events = run_loosely(served, request("a", max_tokens=9))
    assert [event.text for event in events] == ["a", "b", ""]
    assert finish(events).reason == "error"
    assert finish(events).error == "ValueError: no such token"
    assert "no such token" in caplog.text
    assert finish(run_loosely(served, request("b", max_tokens=2))).reason == "length"


def run_loosely(served: Engine, one: Request) -> list[Event]:
    served.add(one)
    events: list[Event] = []
    while served.has_work:
        events += served.step()
    return events


def test_a_model_that_raises_leaves_every_request_to_be_ended() -> None:
    faults = iter([True, False])

    def change(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if next(faults, False):
            raise RuntimeError("out of memory")
        return logits

    served = engine(Wrapped(change), max_sequences=2)
    for name in "abc":
        served.add(request(name))
    with pytest.raises(RuntimeError, match="out of memory"):
        served.step()
    events = served.abort_all(error="out of memory")
    assert {(event.request_id, event.reason, event.error) for event in events} == {
        (name, "error", "out of memory") for name in "abc"
    }
    assert served.status().free_blocks == served.status().total_blocks
    assert finish(run(served, request("d", max_tokens=3))["d"]).reason in ("length", "stop")


@pytest.mark.parametrize("then", ["step", "abort_all"])
def test_who_is_overdue_when_a_step_fails_ends_once_all_the_same(then: str) -> None:
    faults = iter([True])

    def change(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if next(faults, False):
            raise RuntimeError("out of memory")
        return logits

    served = engine(Wrapped(change))
    options = RequestOptions(timeout_s=0.0)
    served.add(dataclasses.replace(request("overdue"), options=options))
    served.add(request("other", max_tokens=1))
    with pytest.raises(RuntimeError, match="out of memory"):
        served.step()
    events = served.step() if then == "step" else served.abort_all(error="out of memory")
    ends = [e for e in [*events, *served.abort_all()] if isinstance(e, FinishEvent)]
    assert [(end.request_id, end.reason) for end in ends] == [
        ("overdue", "timeout"),
        ("other", "length" if then == "step" else "error"),
    ]


def test_what_is_refused_leaves_no_trace() -> None:
    served = engine()
    for wrong, message in (
        (request("a", ()), "empty"),
        (request("a", (258,)), "outside the vocabulary"),
        (request("a", "x" * 256), "256 tokens, the context 256"),
        (request("a", min_tokens=1, stop_token_ids=tuple(range(258))), "every token"),
    ):
        with pytest.raises(RequestError, match=message):
            served.add(wrong)
        assert not served.has_work
    served.add(request("a"))
    with pytest.raises(RequestError, match="already being served"):
        served.add(request("a"))
    served.abort("a")
    served.add(request("a"))


def test_a_request_without_a_seed_gets_one_that_repeats_it() -> None:
    served = engine()
    one = request("a", temperature=1.5, max_tokens=20, ignore_eos=True)
    accepted = served.add(one)
    assert accepted.sampling.seed is not None
    events: list[Event] = []
    while served.has_work:
        events += served.step()
    assert tokens(run(engine(), accepted)["a"]) == tokens(events)
    assert served.add(one).sampling.seed != accepted.sampling.seed


def test_reference_ops_are_used_on_request() -> None:
    """The backends of every op are left out inside the step, and only there."""
    seen = []

    def look(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(registry._reference_only.get())
        return logits

    for wanted in (True, False):
        run(engine(Wrapped(look), reference_ops=wanted), request("a", max_tokens=1))
    assert seen == [True, False]
    assert not registry._reference_only.get()
