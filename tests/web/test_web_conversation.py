"""A conversation's edits, and its JSON: what is said stays what it was, to the letter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall
from qwenkit.web import conversation as talk
from qwenkit.web.conversation import Conversation, Stats, Turn
from qwenkit.web.stored import from_json, to_json, to_plain, whole

REPLY = Turn(role="assistant", text="Paris.", ended="stop")
CALLS = Turn(
    role="assistant",
    text="",
    calls=(ToolCall("weather", '{"city": "Paris"}', id="a"), ToolCall("clock", "{}", id="b")),
    ended="tool_calls",
)


def said(*turns: Turn) -> Conversation:
    return Conversation(id="abc", turns=turns)


def user(text: str) -> Turn:
    return Turn(role="user", text=text)


def roles(conversation: Conversation) -> list[str]:
    return [turn.role for turn in conversation.turns]


def test_a_message_is_kept_as_it_was_typed_and_gives_the_title() -> None:
    text = "\n  <b>What</b> &amp; why?\r\n\tSecond line"
    conversation = talk.say(talk.begin("Be kind."), text)
    assert conversation.turns == (user(text),)
    assert conversation.title == "<b>What</b> &amp; why?"
    assert (conversation.system, conversation.revision) == ("Be kind.", 1)
    assert talk.say(talk.with_turn(conversation, REPLY), "more").title == conversation.title


def test_a_long_title_is_shortened() -> None:
    assert talk.title_of("word " * 100) == ("word " * 9).rstrip() + " wo…"
    assert len(talk.title_of("x" * 5_000_000)) == 48


def test_an_empty_message_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        talk.say(talk.begin(), " \n ")


def test_a_reply_that_said_nothing_makes_room_for_the_next_message() -> None:
    failed = Turn(role="assistant", text="", ended="error", error="no server")
    conversation = talk.say(said(user("a"), failed), "b")
    assert conversation.turns == (user("a"), user("b"))


def test_calls_wait_for_their_results_one_after_the_other() -> None:
    conversation = said(user("Weather?"), CALLS)
    assert talk.pending_call(conversation) == CALLS.calls[0]
    conversation = talk.say(conversation, "12 °C")
    assert talk.pending_call(conversation) == CALLS.calls[1]
    conversation = talk.say(conversation, "")  # a tool may return nothing
    assert talk.pending_call(conversation) is None
    assert [turn.call_id for turn in conversation.turns[-2:]] == ["a", "b"]
    assert talk.pending_call(talk.with_turn(conversation, REPLY)) is None
    assert talk.pending_call(said(user("x"))) is None


def test_an_edited_message_is_answered_anew_and_an_edited_reply_stays() -> None:
    conversation = talk.say(said(user("a"), REPLY), "b")
    changed, must_answer = talk.edit(conversation, 0, "A")
    assert (changed.turns, must_answer) == ((user("A"),), True)
    changed, must_answer = talk.edit(conversation, 1, "Lyon.")
    assert not must_answer
    assert [turn.text for turn in changed.turns] == ["a", "Lyon.", "b"]
    assert changed.turns[1].ended == "edited"


def test_a_title_that_was_chosen_outlives_an_edit_of_the_first_message() -> None:
    conversation = talk.say(talk.begin(), "first")
    assert talk.edit(conversation, 0, "other")[0].title == "other"
    assert talk.edit(talk.rename(conversation, "mine"), 0, "other")[0].title == "mine"


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_a_message_that_is_not_there_cannot_be_edited(index: int) -> None:
    with pytest.raises(UsageError, match="There is no message"):
        talk.edit(said(user("a"), REPLY), index, "x")


def test_answering_again_and_taking_back() -> None:
    conversation = said(user("a"), REPLY, user("b"), CALLS, Turn(role="tool", text="1"), REPLY)
    assert roles(talk.without_reply(conversation)) == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    back, text = talk.undo(conversation)
    assert (roles(back), text) == (["user", "assistant"], "b")
    assert talk.undo(back)[0].turns == ()
    for deed in (talk.without_reply, talk.undo):
        with pytest.raises(UsageError):
            deed(talk.begin())


def test_speed_counts_from_the_first_token() -> None:
    stats = Stats(completion_tokens=11, pieces=5, first_s=1.0, total_s=3.0)
    assert stats.tokens_per_second == 5.0
    assert Stats(pieces=5, first_s=1.0, total_s=3.0).tokens_per_second == 2.0
    assert Stats(completion_tokens=1, first_s=1.0, total_s=3.0).tokens_per_second is None
    assert Stats().tokens_per_second is None


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
TURNS = st.builds(
    Turn,
    role=st.sampled_from(["user", "assistant", "tool"]),
    text=TEXTS,
    reasoning=TEXTS,
    calls=st.lists(
        st.builds(ToolCall, TEXTS, TEXTS, TEXTS.map(lambda t: t or None)), max_size=2
    ).map(tuple),
    call_id=TEXTS.map(lambda t: t or None),
    model=TEXTS,
    ended=TEXTS,
    error=TEXTS,
    stats=st.none() | st.builds(Stats, pieces=st.integers(1, 9), first_s=st.floats(0, 9)),
)


@given(
    st.builds(
        Conversation,
        id=st.just("a1"),
        title=TEXTS,
        system=TEXTS,
        turns=st.lists(TURNS, max_size=4).map(tuple),
        revision=st.integers(0, 9),
    )
)
def test_json_gives_the_same_conversation_back(conversation: Conversation) -> None:
    assert from_json(to_json(conversation)) == conversation
    assert from_json(to_json(conversation, indent=2)) == conversation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"id": "../../x"}, "id"),
        ({"id": "a" * 65}, "id"),
        ({"title": 3}, "title"),
        ({"turns": {}}, "turns"),
        ({"turns": [{"role": "system", "text": ""}]}, r"turns\[0\].role"),
        ({"turns": [{"role": "user", "text": 1}]}, r"turns\[0\].text"),
        ({"turns": [{"role": "user", "text": "", "stats": {"first_s": "x"}}]}, "first_s"),
        ({"turns": [{"role": "user", "text": "", "calls": [{"name": None}]}]}, r"calls\[0\].name"),
        ({"revision": float("nan")}, "revision"),
    ],
)
def test_what_comes_back_from_a_browser_is_checked(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_json(json.dumps({**to_plain(said(user("a"))), **change}))


def test_what_is_no_json_is_refused() -> None:
    for text in ("", "{", "[" * 100_000, "null", "[]"):
        with pytest.raises(UsageError):
            from_json(text)


def test_halves_of_characters_become_whole_ones() -> None:
    assert whole("a\ud83d\ude00b\ud83dc\ude00") == "a😀b\ufffdc\ufffd"
    conversation = from_json(to_json(said(user("x"))).replace('"x"', '"\\ud83d"'))
    assert conversation.turns[0].text == "\ufffd"
