"""Marked text behaves as the text it stands for, and every character keeps its mark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.chat.guard import TEXT_METHODS, Guard, Guarded
from qwenkit.chat.values import Limits, Run
from qwenkit.errors import TemplateError

LIMITS = Limits(seconds=60, characters=10**7, value_characters=10**6, value_items=10**5)
GUARD = Guard(["<|im_end|>"], given={0, 1}, own={0}, max_characters=10**6, max_items=10**5)
ALPHABET = st.sampled_from("ab <>/\n\r\t,.#ßİÅé中\u2028\x1f😀𐐨")
TEXT = st.text(ALPHABET, max_size=12)
SHORT = st.text(ALPHABET, max_size=2)
NEEDLE = st.text(ALPHABET, min_size=1, max_size=2)
NUMBER = st.integers(-4, 14)


def run() -> Run:
    """A rendering with all of its time before it."""
    return Run(GUARD, LIMITS)


@st.composite
def mixed(draw: st.DrawFn) -> tuple[str, Guarded]:
    """A text, and the same with some of its characters marked as foreign."""
    text = draw(TEXT)
    foreign = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    marked = [GUARD.mark(c) if f else c for c, f in zip(text, foreign, strict=True)]
    return text, GUARD.own("".join(marked))


def plain(value: Any) -> Any:
    if isinstance(value, str):
        return GUARD.plain(value)
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


CALLS: Sequence[tuple[str, st.SearchStrategy[tuple[Any, ...]]]] = (
    *((name, st.just(())) for name in ("isalpha", "isdigit", "islower", "isspace", "isupper")),
    *((name, st.just(())) for name in ("lower", "upper", "title", "capitalize", "split")),
    *((name, st.just(())) for name in ("rsplit", "strip", "lstrip", "rstrip")),
    *((name, st.tuples(SHORT)) for name in ("strip", "lstrip", "rstrip", "count")),
    *((name, st.tuples(SHORT)) for name in ("startswith", "endswith", "find", "rfind")),
    *((name, st.tuples(SHORT)) for name in ("removeprefix", "removesuffix")),
    *((name, st.tuples(st.tuples(SHORT, SHORT))) for name in ("startswith", "endswith")),
    *((name, st.tuples(SHORT, NUMBER, NUMBER)) for name in ("find", "rfind", "count")),
    *((name, st.tuples(st.none(), NUMBER)) for name in ("split", "rsplit")),
    *((name, st.tuples(NEEDLE, NUMBER)) for name in ("split", "rsplit")),
    ("partition", st.tuples(NEEDLE)),
    ("splitlines", st.tuples(st.booleans())),
    ("replace", st.tuples(SHORT, SHORT)),
    ("replace", st.tuples(SHORT, SHORT, NUMBER)),
    ("join", st.tuples(st.lists(TEXT, max_size=3))),
    ("__getitem__", st.tuples(st.slices(8))),
    ("__contains__", st.tuples(SHORT)),
    ("__add__", st.tuples(TEXT)),
    ("__mul__", st.tuples(NUMBER)),
    ("__repr__", st.just(())),
    ("__len__", st.just(())),
    *((name, st.tuples(TEXT)) for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__")),
)


def test_every_method_is_compared() -> None:
    assert {name for name, _ in CALLS} >= TEXT_METHODS - {"index"}


@pytest.mark.parametrize("name_and_arguments", CALLS, ids=lambda call: str(call[0]))
@settings(max_examples=40)
@given(data=st.data(), pair=mixed())
def test_methods_see_the_plain_text(
    name_and_arguments: tuple[str, st.SearchStrategy[tuple[Any, ...]]],
    data: st.DataObject,
    pair: tuple[str, Guarded],
) -> None:
    name, arguments = name_and_arguments
    text, guarded = pair
    given_arguments = data.draw(arguments)
    expected = getattr(text, name)(*given_arguments)
    assert plain(getattr(guarded, name)(*given_arguments)) == expected
    if given_arguments and isinstance(given_arguments[0], str):  # a marked argument is the same
        marked = (GUARD.guarded(given_arguments[0]), *given_arguments[1:])
        assert plain(getattr(guarded, name)(*marked)) == expected


@given(mixed(), NEEDLE, SHORT)
def test_pieces_keep_the_marks_of_their_characters(
    pair: tuple[str, Guarded], separator: str, new: str
) -> None:
    raw = str.__str__(pair[1])
    assert "".join(pair[1].split(separator)) == _without(raw, separator)
    assert separator.join(pair[1].split(separator)) == str.__str__(
        pair[1].replace(separator, separator)
    )
    assert "".join(pair[1].splitlines(True)) == raw
    assert "".join(pair[1].partition(separator)) == raw
    assert raw.endswith(str.__str__(pair[1].lstrip()))
    assert raw.startswith(str.__str__(pair[1].rstrip(separator)))
    assert "".join(pair[1]) == raw
    replaced = str.__str__(pair[1].replace(separator, GUARD.mark(new)))
    assert GUARD.plain(replaced) == pair[0].replace(separator, new)


def _without(marked: str, separator: str) -> str:
    """`marked` less the places where its plain text reads `separator`."""
    plain_text, kept, position = GUARD.plain(marked), "", 0
    while (found := plain_text.find(separator, position)) >= 0:
        kept += marked[position:found]
        position = found + len(separator)
    return kept + marked[position:]


@given(mixed())
def test_a_character_in_another_case_is_as_foreign_as_before(pair: tuple[str, Guarded]) -> None:
    for name in ("lower", "upper", "title", "capitalize"):
        raw, changed = str.__str__(pair[1]), str.__str__(getattr(pair[1], name)())
        ours = {GUARD.plain(c).lower() for c in raw if GUARD.plain(c) == c and c <= "\uffff"}
        for character in changed:
            if GUARD.plain(character) == character and character <= "\uffff":
                assert character.lower() in ours


@given(mixed())
def test_equal_texts_hash_alike_whatever_their_marks(pair: tuple[str, Guarded]) -> None:
    text, guarded = pair
    assert guarded == text
    assert text == guarded
    assert hash(guarded) == hash(text)
    assert {text: 1}[guarded] == 1
    keyed: dict[str, int] = {guarded: 1}
    assert keyed[text] == 1
    assert guarded in [text]
    assert text in (guarded,)
    assert guarded != 1
    assert f"{guarded}" == str.__str__(guarded)
    assert str(guarded) is guarded


@given(st.text(max_size=20))
def test_marks_are_one_to_one(text: str) -> None:
    guard = Guard(["<"], given=set(range(14)), own={0}, max_characters=99, max_items=9)
    fitting = "".join(c for c in text if ord(c) >> 16 < 14)
    assert guard.plain(guard.mark(fitting)) == fitting
    assert len(guard.mark(fitting)) == len(fitting)
    assert guard.guarded(fitting).plain == fitting


def test_lone_surrogates_survive() -> None:
    assert GUARD.guarded("a\ud800b").replace("a", "").plain == "\ud800b"


def test_too_long_results_are_refused_before_they_are_made() -> None:
    guard = Guard(["<"], given={0}, own={0}, max_characters=100, max_items=10)
    text = guard.guarded("a,b" * 20)
    calls: Sequence[Callable[[], object]] = (
        lambda: text * 10**12,
        lambda: text + text,
        lambda: text.replace("a", "a" * 10**4),
        lambda: text.replace("", "abcd"),
        lambda: text.join(["x"] * 10),
        lambda: text.split(","),
        lambda: text.rsplit(","),
        lambda: guard.guarded("\n" * 20).splitlines(),
    )
    for call in calls:
        with pytest.raises(TemplateError, match="the chat template builds a"):
            call()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def _marked(value: Any) -> Any:
    if isinstance(value, str):
        return GUARD.guarded(value)
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, dict):
        return {_marked(key): _marked(item) for key, item in value.items()}
    return value


@given(
    value=JSON,
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    sort_keys=st.booleans(),
    separators=st.sampled_from([None, (",", ":")]),
)
def test_json_is_what_json_dumps_writes(
    value: Any,
    ensure_ascii: bool,
    indent: int | str | None,
    sort_keys: bool,
    separators: tuple[str, str] | None,
) -> None:
    expected = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        sort_keys=sort_keys,
        separators=separators,
    )
    written = run().json(
        _marked(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        sort_keys=sort_keys,
        separators=separators,
    )
    assert written.plain == expected
    ours = "".join(c for c in str.__str__(written) if GUARD.plain(c) == c and c <= "\uffff")
    skeleton = set('{}[]":, \n\t-+.e0123456789truefalsenullInfinity')
    assert set(ours) <= skeleton
    assert run().text(_marked(value)) == (value if isinstance(value, str) else str(value))
