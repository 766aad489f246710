"""The HTTP client and the closed loop of clients, against a fake server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_openai_server import FakeServer, running
from typer.testing import CliRunner

from qwenkit.bench.http_client import Connection, Target, ask, wait_until_ready
from qwenkit.bench.http_load import (
    LevelResult,
    LoadShape,
    TurnResult,
    measure_second_turn,
    run_turn,
)
from qwenkit.bench.openai_stream import COMPLETIONS, Reply, stream_reply
from qwenkit.bench.reliability.spec import Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.serving_http import HttpReport, measure_url
from qwenkit.cli.bench_http import read_clients, summary
from qwenkit.cli.main import app
from qwenkit.errors import NetworkError, QwenkitError, UsageError


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/api/v1", "https://h:443/api"),
        ("h:80", "http://h:80"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_a_url_names_a_server_with_or_without_v1(url: str, made: str) -> None:
    assert Target.parse(url).url == made


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="url"):
        Target.parse(url)


def test_a_request_is_sent_as_it_is_and_headers_replace_by_name() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with running(fake) as target:
            answer = await ask(target, "/x", {"a": 1}, headers=(("Host", "evil"), ("X", "1")))
            assert (answer.status, answer.json()) == (200, {"path": "/x"})
            await ask(target, "/y", b"raw \xff", method="PUT")
        (first, second) = fake.requests
        assert first[:2] == ("POST", "/x")
        assert first[3] == b'{"a": 1}'
        assert first[2]["host"] == "evil"
        assert (first[2]["x"], first[2]["authorization"]) == ("1", "Bearer k")
        assert (second[0], second[3]) == ("PUT", b"raw \xff")

    asyncio.run(run())


def test_nobody_there_is_an_answer_too() -> None:
    async def run() -> None:
        nobody = Target(host="127.0.0.1", port=1)
        answer = await ask(nobody, "/x")
        assert answer.status == 0
        assert answer.error
        with pytest.raises(NetworkError, match="not ready"):
            await wait_until_ready(nobody, "/ready", 0.1)

    asyncio.run(run())


def test_a_stream_is_read_to_its_end_in_pieces() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with running(fake) as target:
            connection = await Connection.open(target)
            for path in ("/v1/chat/completions", COMPLETIONS):
                reply = await stream_reply(
                    target, {"max_tokens": 3}, path=path, connection=connection
                )
                assert reply.text == "0 1 2 "
                assert (reply.tokens, reply.finish_reason) == (3, "length")
                assert reply.is_whole
                assert reply.error is None
                assert len(reply.between_s) == 2
                assert 0 < reply.times_s[0] <= reply.times_s[-1] <= reply.end_s
            connection.close()
        assert fake.connections == 1

    asyncio.run(run())


@pytest.mark.parametrize("broken", [{"break_after": 2}, {"status": 429}])
def test_a_stream_that_is_cut_or_refused_says_so(broken: dict[str, Any]) -> None:
    async def run() -> Reply:
        async with running(FakeServer(**broken)) as target:
            return await stream_reply(target, {"max_tokens": 3})

    reply = asyncio.run(run())
    assert not reply.is_whole
    assert reply.error
    assert reply.status == broken.get("status", 200)


def test_log_probabilities_are_one_list_however_they_came() -> None:
    chat = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]
    apart, together = Reply(), Reply()
    for each in chat:
        apart.add({"choices": [{"logprobs": {"content": [each]}}]}, 0.0)
    together.add({"choices": [{"logprobs": {"content": chat}}]}, 0.0)
    assert apart.logprobs == together.logprobs == chat
    raw = Reply()
    raw.add({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]}, 0.0)
    assert raw.logprobs == [["a", -1.0]]


def test_a_closed_loop_has_so_many_clients_and_counts_their_tokens() -> None:
    async def run() -> None:
        fake = FakeServer(pause_s=0.001)
        shape = LoadShape(answer_tokens=5, requests_each=3)
        async with running(fake) as target:
            result = await run_turn(target, shape, 4)
        assert (result.requests, result.tokens, result.errors) == (12, 60, [])
        assert fake.most_at_once == 4
        assert fake.connections == 4
        assert len(result.first_s) == 12
        assert len(result.between_s) == 48
        assert result.tokens_per_second == pytest.approx(60 / result.seconds)
        prompts = {json.loads(body)["messages"][0]["content"] for *_, body in fake.requests}
        assert len(prompts) == 12  # nothing for a prefix cache

    asyncio.run(run())


def test_ids_go_to_the_raw_route_and_failures_are_counted() -> None:
    async def run() -> None:
        fake = FakeServer(break_after=1)
        shape = LoadShape(answer_tokens=5, requests_each=2, vocab_size=100, ignore_eos=True)
        async with running(fake) as target:
            result = await run_turn(target, shape, 2)
        assert (result.requests, result.tokens, len(result.errors)) == (4, 0, 4)
        assert {path for _, path, *_ in fake.requests} == {COMPLETIONS}
        content = json.loads(fake.requests[0][3])
        assert max(content["prompt"]) < 100
        assert content["ignore_eos"] is True

    asyncio.run(run())


def test_a_second_turn_holds_the_first() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with running(fake) as target:
            turn = await measure_second_turn(
                target, LoadShape(answer_tokens=2), conversations=2, prompt_words=7
            )
        assert len(turn.first_s) == len(turn.second_s) == 2
        assert (turn.cached_tokens, turn.prompt_tokens) == (4, 9)
        messages = json.loads(fake.requests[-1][3])["messages"]
        assert [each["role"] for each in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == "0 1 "

    asyncio.run(run())


def test_a_second_turn_of_ids_begins_with_those_of_the_first() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with running(fake) as target:
            shape = LoadShape(answer_tokens=2, vocab_size=100)
            await measure_second_turn(target, shape, conversations=1, prompt_words=7)
        first, second = (json.loads(each[3])["prompt"] for each in fake.requests[-2:])
        assert len(first) == 7
        assert second[:7] == first
        assert len(second) > 7
        assert max(second) < 100

    asyncio.run(run())


def test_a_server_is_measured_at_each_number_of_clients() -> None:
    async def run() -> None:
        shape = LoadShape(answer_tokens=2, requests_each=1)
        said: list[str] = []
        async with running(FakeServer()) as target:
            levels, second = await measure_url(
                target,
                shape,
                (1, 3),
                turns=2,
                conversations=1,
                progress=lambda what, share: said.append(what),
            )
        assert [level.clients for level in levels] == [1, 3]
        assert levels[1].to_json()["requests"] == 6
        assert second is not None
        assert said
        async with running(FakeServer(status=404)) as target:
            with pytest.raises(QwenkitError, match="/v1/chat/completions"):
                await measure_url(
                    target, shape, (1,), turns=1, conversations=0, progress=lambda w, s: None
                )

    asyncio.run(run())


def test_victims_notice_a_changed_byte() -> None:
    async def run() -> None:
        fake, tally = FakeServer(), Tally()
        async with running(fake) as target:
            victims = Victims(target, "m", count=3, tokens=4)
            await victims.record()
            async with victims.streaming(tally, "nothing"):
                await asyncio.sleep(0.05)
            assert tally.total >= 3
            assert not tally.failures
            fake.spoil = "!"
            await victims.check_all(tally, "spoiling")
        assert len(tally.failures) == 3

    asyncio.run(run())


def report(**ours: float) -> HttpReport:
    made = HttpReport(server_bytes=300_000_000, engine_bytes=200_000_000, start_s=[3.0, 9.0, 2.0])
    level = made.levels[16] = {}
    for name, speed in ours.items():
        turns = [TurnResult(tokens=int(speed * n), seconds=n) for n in (1.0, 2.0)]
        level[name.replace("_", ".")] = LevelResult(clients=16, turns=turns)
    level["qwenkit, no HTTP"] = LevelResult(
        clients=16, turns=[TurnResult(tokens=100, seconds=1.0)] * 2
    )
    return made


def test_figures_stand_beside_their_bars() -> None:
    made = report(qwenkit=97, llama_cpp=48, vllm=10)
    made.failed["other"] = "is not here"
    assert made.ratio(16, "llama.cpp") == pytest.approx(97 / 48)
    assert made.ratio(16, "absent") is None
    assert summary(made) == [
        "16 clients, tokens/s over llama.cpp's: 2.02 (at least 2.5: NOT kept)",
        "16 clients, tokens/s over vllm's: 9.70 (at least 2.5: kept)",
        "cost of HTTP at 16 clients: 3.0% (under 5%: kept)",
        "idle memory over the engine's: 100 MB (at most 120: kept)",
        "start to ready, default model: 3.0 s (at most 4: kept)",
        "other: is not here",
    ]


@pytest.mark.parametrize("given", ["", "x", "0", "1,2000"])
def test_numbers_of_clients_are_checked(given: str) -> None:
    with pytest.raises(UsageError, match="--clients"):
        read_clients(given)


def test_the_command_measures_a_server_and_refuses_a_mixed_part() -> None:
    arguments = ["bench", "serving", "--url", "http://127.0.0.1:1"]
    assert "127.0.0.1:1" in CliRunner().invoke(app, arguments).output
    mixed = ["bench", "serving", "--part", "http", "--part", "load", "--shape", "qwen2-0.5b"]
    assert "stands alone" in CliRunner().invoke(app, mixed).output
