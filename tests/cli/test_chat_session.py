"""The conversation itself: history, context, settings, and the commands that change them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from qwenkit.cli.chat_commands import COMMANDS, is_command, run_command
from qwenkit.cli.chat_session import ChatSession, Turn
from qwenkit.cli.reply import Reply
from qwenkit.errors import RequestError, UsageError
from qwenkit.types.events import Event, FinishEvent, PromptEvent, TokenEvent, Usage
from qwenkit.types.messages import Message
from qwenkit.types.sampling import LoopDetection, SamplingParams


@pytest.fixture
def session(model: Any) -> ChatSession:
    return ChatSession(model, sampling=model.record.sampling.replace(seed=1234))


def talk(session: ChatSession, question: str) -> str | None:
    reply = session.ask(question)
    assert "".join(reply.pieces()) == reply.text
    return session.keep(reply)


def command(session: ChatSession, line: str) -> str:
    return run_command(session, line).text


def test_history_goes_into_the_next_request(session: ChatSession, model: Any) -> None:
    assert talk(session, "你好") is None
    talk(session, "again")
    assert model.sent[1] == (
        Message("user", "你好"),
        Message("assistant", "Hello."),
        Message("user", "again"),
    )
    assert [turn.question for turn in session.turns] == ["你好", "again"]


@pytest.mark.parametrize("system", [None, "", "Speak Latin."])
def test_system_prompt_is_absent_empty_or_given(model: Any, system: str | None) -> None:
    talk(ChatSession(model, sampling=SamplingParams(), system=system), "q")
    head = [] if system is None else [Message("system", system)]
    assert list(model.sent[0]) == [*head, Message("user", "q")]


def test_settings_reach_generation_and_can_be_reset(session: ChatSession, model: Any) -> None:
    assert command(session, ":conf temperature=0.7") == "temperature = 0.7"
    command(session, ":conf stop=END OF TEXT")
    command(session, ":seed 7")
    talk(session, "q")
    assert model.used[0] == SamplingParams(temperature=0.7, stop=("END OF TEXT",), seed=7)
    assert "* temperature = 0.7" in command(session, ":conf")
    command(session, ":reset-conf")
    talk(session, "q")
    assert model.used[1] == SamplingParams(temperature=0.2, seed=7)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("max_tokens=9", "max_tokens", 9),
        ("max_tokens = none", "max_tokens", None),
        ("top_p=.5", "top_p", 0.5),
        ("ignore_eos=True", "ignore_eos", True),
        ('stop=["\\n", "a=b"]', "stop", ("\n", "a=b")),
        ("stop=a=b", "stop", ("a=b",)),
        ("stop_token_ids=1,2", "stop_token_ids", (1, 2)),
        ("stop_token_sequences=[[1, 2], [3]]", "stop_token_sequences", ((1, 2), (3,))),
        ('logit_bias={"5": -1, "3": 2.5}', "logit_bias", ((3, 2.5), (5, -1.0))),
        ("logit_bias=[[3, 2.5]]", "logit_bias", ((3, 2.5),)),
        ('allowed_scripts=["latin", "Han"]', "allowed_scripts", ("Latin", "Han")),
        ("loop_detection=true", "loop_detection", LoopDetection()),
        ("loop_detection=none", "loop_detection", None),
        ('loop_detection={"tokens": 9}', "loop_detection", LoopDetection(tokens=9)),
    ],
)
def test_conf_reads_values_by_their_type(
    session: ChatSession, given: str, name: str, value: object
) -> None:
    command(session, f":conf {given}")
    assert getattr(session.sampling, name) == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("temprature=1", "'temperature'"),
        ("max_new_tokens=5", "'max_tokens'"),
        ("temperature=__import__('os')", "expected a number"),
        ("temperature=nan", "finite"),
        ("temperature=-1", "allowed"),
        ("top_k=1.5", "whole number"),
        ("ignore_eos=maybe", "true or false"),
        ("stop=[1]", "list of texts"),
        ("stop_token_ids=[true]", "token ids"),
        (f"stop_token_sequences={'[' * 100000}", "id lists"),
        ("logit_bias=5", 'like {"13": -100}'),
        ("logit_bias={5", 'like {"13": -100}'),
        ('logit_bias={"5": 200}', "-100.0 to 100.0"),
        ("allowed_scripts=Klingon", "no Unicode script"),
        ("loop_detection=4", "true, none, or a JSON object"),
        ('loop_detection={"repeat": 4}', "'repeats'"),
        (f"loop_detection={'{' * 100000}", "JSON object"),
        ("temperature", "name=value"),
        ("=", "conf: write name=value"),
    ],
)
def test_conf_refuses_by_name_and_changes_nothing(
    session: ChatSession, given: str, said: str
) -> None:
    before = session.sampling
    with pytest.raises(RequestError, match=re.escape(said)):
        command(session, f":conf {given}")
    assert session.sampling == before


def test_seed_is_shown_set_and_emptied(session: ChatSession) -> None:
    assert command(session, ":seed") == "seed = 1234"
    assert command(session, ":seed 9") == "seed = 9"
    assert "none" in command(session, ":seed none")
    with pytest.raises(RequestError, match="seed"):
        command(session, ":seed -1")


def test_history_and_clear_history(session: ChatSession) -> None:
    assert "No history" in command(session, ":history")
    talk(session, "first")
    assert command(session, ":his") == "[1] User: first\n[1] Scripted-Chat: Hello."
    assert "1 turn)" in command(session, ":clh")
    assert session.turns == []


def test_every_name_of_the_original_demo_works(session: ChatSession) -> None:
    text = command(session, ":help")
    for name in re.findall(r"\S+", "help h exit quit q clear cl clear-his clh history his seed"):
        assert f":{name}" in text
        run_command(session, f":{name}")
    assert ":conf [k=v]" in text
    assert ":reset-conf" in text
    assert [run_command(session, f":{n}").action for n in ("exit", "quit", "q")] == ["exit"] * 3
    assert run_command(session, ":clear").action == "clear screen"
    names = [name for entry in COMMANDS for name in entry.names]
    assert len(names) == len(set(names))


def test_unknown_command_names_the_nearest(session: ChatSession) -> None:
    with pytest.raises(UsageError, match="'history'"):
        run_command(session, ":histroy")
    with pytest.raises(UsageError, match="no argument"):
        run_command(session, ":clear everything")


@pytest.mark.parametrize(
    ("line", "is_one"),
    [(":help", True), (":)", False), (" :help", False), (":", True), (": a", False)],
)
def test_what_is_a_command(line: str, is_one: bool) -> None:
    assert is_command(line) is is_one


def test_stopped_reply_stays_marked_and_can_go_on(session: ChatSession, model: Any) -> None:
    model.script = ("Hel", "lo", "^C", ".")
    reply = session.ask("q")
    assert "".join(reply.pieces()) == "Hello"
    assert model.open_streams == 0, "the request must be aborted"
    assert "history" in (session.keep(reply) or "")
    assert session.turns == [Turn("q", "Hello", "abort")]
    assert "stopped" in command(session, ":history")

    model.script = (" again", "!")
    reply = session.resume()
    assert "".join(reply.pieces()) == " again!"
    session.keep(reply, continued=True)
    assert session.turns == [Turn("q", "Hello again!", "stop")]
    assert model.sent[1] == (Message("user", "q"), Message("assistant", "Hello"))
    assert model.continued == [False, True]


def test_reply_stopped_before_its_first_word_is_not_kept(session: ChatSession, model: Any) -> None:
    model.script = ("^C", "never")
    reply = session.ask("q")
    assert list(reply.pieces()) == []
    assert "not kept" in (session.keep(reply) or "")
    assert session.turns == []
    with pytest.raises(RequestError, match="no answer"):
        session.resume()


def test_failed_reply_is_reported_and_not_kept(session: ChatSession, model: Any) -> None:
    model.reason, model.error = "error", "logits are not finite"
    assert "logits are not finite" in (talk(session, "q") or "")
    assert session.turns == []


def test_cut_reply_says_so(session: ChatSession, model: Any) -> None:
    model.reason = "length"
    assert "limit" in (talk(session, "q") or "")
    assert session.turns[0].ended == "length"


def test_oldest_turns_leave_when_the_context_is_full_and_it_is_said(
    session: ChatSession, model: Any
) -> None:
    model.context_tokens = 400  # 100 of them are kept free for the reply
    notices = []
    for letter in "abc":
        reply = session.ask(letter * 120)
        notices.append(reply.notices)
        list(reply.pieces())
        session.keep(reply)
    assert notices[:2] == [(), ()]
    said = "Not sent any more: the 2 oldest messages; the context of 400 tokens is full."
    assert notices[2] == (said,)
    assert [m.content[0] for m in model.sent[2]] == ["b", "H", "c"]
    assert "[1] (no longer sent)" in command(session, ":history")
    assert len(session.turns) == 3, "the person still sees everything"


def test_message_longer_than_the_context_is_refused_and_nothing_is_lost(
    session: ChatSession, model: Any
) -> None:
    talk(session, "q")
    with pytest.raises(RequestError, match="1000 tokens with its template, the context only 1000"):
        session.ask("x" * 1000)
    assert session.unseen_turns == 0
    assert talk(session, "q") is None


def test_what_the_history_window_drops_is_reported_once(model: Any) -> None:
    model.window_tokens = 30
    session = ChatSession(model, sampling=SamplingParams())
    talk(session, "a" * 20)
    reply = session.ask("b" * 20)
    said = "beyond the model's history window of 30 tokens."
    assert reply.notices == (f"Not sent any more: the oldest message; {said}",)
    list(reply.pieces())
    assert session.ask("b").notices == (), "said only when more is dropped"


def test_base_model_is_refused_at_once(model: Any) -> None:
    model.chat_format = "raw"
    with pytest.raises(UsageError, match="base model"):
        ChatSession(model, sampling=SamplingParams())


def test_closing_line_gives_tokens_speed_and_first_token_time() -> None:
    events: list[Event] = [
        TokenEvent("r", 1, "a"),
        TokenEvent("r", 2, "b"),
        TokenEvent("r", 3, ""),
        FinishEvent("r", "length", "c", Usage(4, 3)),
    ]
    ticks = itertools.count(0, 0.5)
    reply = Reply("q", iter(events), clock=lambda: next(ticks))
    assert list(reply.pieces()) == ["a", "b", "c"]
    assert reply.summary() == (
        "3 tokens · 2.0 tokens/s · first token after 0.50 s · cut at the token limit"
    )


def test_system_prompt_is_shown_and_set_for_the_next_turn(session: ChatSession, model: Any) -> None:
    assert "model's own" in command(session, ":system")
    assert command(session, ":system Speak  Latin.") == 'system = "Speak  Latin."'
    talk(session, "q")
    assert model.sent[0] == (Message("system", "Speak  Latin."), Message("user", "q"))
    assert command(session, ':system ""') == 'system = ""'


def test_settings_for_programs_are_listed_only_when_changed(session: ChatSession) -> None:
    assert "ignore_eos" not in command(session, ":conf")
    command(session, ":conf ignore_eos=true")
    assert "* ignore_eos = true" in command(session, ":conf")
    assert "logprobs" not in command(session, ":conf")


def test_a_setting_is_shown_as_it_is_read(session: ChatSession) -> None:
    command(session, ":conf loop_detection=true")
    shown = command(session, ":conf")
    line = next(line for line in shown.splitlines() if "loop_detection" in line)
    assert line == '* loop_detection = {"repeats": 4, "tokens": 128, "longest": 256}'
    before = session.sampling
    command(session, f":conf {line[2:]}")
    assert session.sampling == before


def test_a_reply_passes_over_what_was_said_of_its_prompt() -> None:
    events = [
        PromptEvent("r", 0, (None,)),
        TokenEvent("r", 1, "a"),
        FinishEvent("r", "loop", "", Usage(1, 1)),
    ]
    reply = Reply("q", iter(events))
    assert list(reply.pieces()) == ["a"]
    assert reply.token_count == 1
    assert reply.summary().endswith("ended in a loop")


def test_a_lone_colon_is_no_message(session: ChatSession) -> None:
    with pytest.raises(UsageError, match=":help lists"):
        run_command(session, ":")


def test_a_context_made_small_is_named_as_the_reason(session: ChatSession, model: Any) -> None:
    kind = type(model)
    session.model = kind(context_tokens=16)
    record = kind(context_tokens=500).record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "record", record)
        with pytest.raises(RequestError, match="--context, up to 500"):
            session.ask("x" * 20)
