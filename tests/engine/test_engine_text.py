"""Ids to text: stop strings at every split, stop ids and sequences, half characters."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import END, EOS, ByteStream, ByteTokenizer
from qwenkit.engine.text import Ending, Output, StopStrings
from qwenkit.types.sampling import SamplingParams


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The readable rule: the first place where a stop string is complete; of several, the longest
    one.
    """
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def needed(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` might begin a stop string."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


def push_all(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    matcher, out, fed = StopStrings(stops), "", ""
    for piece in pieces:
        certain, stop = matcher.push(piece)
        out, fed = out + certain, fed + piece
        if stop is not None:
            return out, stop
        assert out == fed[: len(fed) - needed(fed, stops)]  # no more held back than must be
    return out + matcher.finish(), None


def splits(text: str) -> list[list[str]]:
    """Every way to cut `text` into pieces."""
    if not text:
        return [[]]
    return [[text[:n], *rest] for n in range(1, len(text) + 1) for rest in splits(text[n:])]


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("Hi\nUser: x", ("\nUser:",)),
        ("aaab", ("aab",)),
        ("ababac", ("abac", "bb")),
        ("abcd", ("abcd", "bc")),  # the shorter one is complete first
        ("xabc", ("abc", "bc", "c")),  # all at once: the longest is cut off
        ("aXaXaY", ("aXaY",)),
        ("plain", ("zz",)),
        ("你好。再见", ("。再",)),
        ("stop", ("stop",)),
        ("abc", ()),
    ],
)
def test_stop_strings_at_every_split(text: str, stops: tuple[str, ...]) -> None:
    expected = cut(text, stops)
    for pieces in splits(text):
        assert push_all(stops, pieces) == expected, pieces


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
)
def test_stop_strings_are_exact_on_any_pieces(pieces: list[str], stops: list[str]) -> None:
    assert push_all(tuple(stops), pieces) == cut("".join(pieces), tuple(stops))


def test_held_text_is_given_out_as_soon_as_it_cannot_be_a_stop() -> None:
    matcher = StopStrings(("###", "#end"))
    assert matcher.push("a#") == ("a", None)
    assert matcher.push("#") == ("", None)
    assert matcher.push("e") == ("#", None)
    assert matcher.push("x") == ("#ex", None)
    assert matcher.finish() == ""


def output(
    *, max_tokens: int = 1000, stop_ids: dict[int, str | int] | None = None, **sampling: object
) -> Output:
    params = SamplingParams.from_mapping(sampling)
    return Output(ByteStream(), params, stop_ids=stop_ids or {}, max_tokens=max_tokens)


def run(out: Output, ids: list[int]) -> tuple[str, Ending, int]:
    """All text, the ending ("abort" where the ids run out) and how many tokens it took."""
    text, ending = "", None
    for token_id in ids:
        delta, ending = out.push(token_id)
        text += delta
        if ending is not None:
            break
    rest, ending = out.finish(ending or Ending("abort"))
    return text + rest, ending, out.tokens


def test_a_stop_id_ends_the_output_and_has_no_text() -> None:
    ids = [*b"ab", ord("c"), *b"d"]
    assert run(output(stop_ids={ord("c"): ord("c")}), ids) == ("ab", Ending("stop", 99), 3)
    assert run(output(stop_ids={EOS: "<eos>"}), [*b"a", EOS]) == ("a", Ending("stop", "<eos>"), 2)


def test_a_stop_id_lets_held_text_out_and_a_stop_string_does_not() -> None:
    ids = [*b"ab##", EOS]
    assert run(output(stop=("###",), stop_ids={EOS: EOS}), ids) == ("ab##", Ending("stop", EOS), 5)
    ids = [*b"ab###", *b"cd"]
    assert run(output(stop=("###",)), ids) == ("ab", Ending("stop", "###"), 5)


def test_a_sequence_of_ids_ends_the_output_and_stays_in_it() -> None:
    ids = [*b"x\nObservation:", *b" no"]
    assert run(output(stop_token_sequences=(tuple(b"Observation:"),)), ids) == (
        "x\nObservation:",
        Ending("stop", ord(":")),
        14,
    )
    # overlapping beginnings are found, and another one running alongside
    sequences = (tuple(b"aab"), tuple(b"zz"))
    assert run(output(stop_token_sequences=sequences), [*b"aaab", 0])[0] == "aaab"
    # a token that means the same text is another token
    assert run(output(stop_token_sequences=((END,),)), [*b"ab", END])[1] == Ending("stop", END)


def test_max_tokens_ends_with_the_text_so_far() -> None:
    assert run(output(max_tokens=3), [*b"abcd"]) == ("abc", Ending("length"), 3)
    assert run(output(max_tokens=2, stop_ids={98: 98}), [*b"ab"]) == ("a", Ending("stop", 98), 2)


def test_the_first_min_tokens_do_not_stop() -> None:
    out = output(min_tokens=3, stop=("b",), stop_token_sequences=(tuple(b"bc"),), max_tokens=9)
    assert run(out, [*b"abcxbc"]) == ("abcx", Ending("stop", "b"), 5)
    out = output(min_tokens=2, stop=("abc",), max_tokens=4)
    assert run(out, [*b"abcd"]) == ("abcd", Ending("length"), 4)  # it begins too early to count
    out = output(min_tokens=2, max_tokens=2, stop=("\ufffd",))
    assert run(out, [0x61, 0xE4]) == ("a\ufffd", Ending("length"), 2)


def test_bytes_that_never_become_a_character_show_only_at_the_end() -> None:
    ids = [*b"a", *"你".encode()[:2]]
    out = output(max_tokens=3)
    assert [out.push(i)[0] for i in ids] == ["a", "", ""]
    assert out.finish(Ending("length")) == ("\ufffd", Ending("length"))
    # …where they can still complete a stop string
    assert run(output(max_tokens=3, stop=("a\ufffd",)), ids) == ("", Ending("stop", "a\ufffd"), 3)
    # …which does not turn an abort into a stop
    assert run(output(stop=("a\ufffd",)), ids) == ("", Ending("abort"), 3)


@settings(deadline=None, max_examples=400, derandomize=True, database=None)
@given(
    text=st.text("ab#é你😀", max_size=16),
    stops=st.lists(st.text("ab#é你😀", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 6),
    controls=st.sets(st.integers(0, 40), max_size=3),
)
def test_at_every_token_all_that_is_certain_has_been_given_out_and_nothing_more(
    text: str, stops: list[str], min_tokens: int, controls: set[int]
) -> None:
    """Every byte is a token, with control tokens, which have no text, between some. The text so far
    is what the ids so far decode to, but for half a character and a beginning of a stop string;
    what the first tokens said begins none.
    """
    ids = list(text.encode())
    for place in sorted(controls):
        ids.insert(place, END)
    out = output(stop=tuple(stops), min_tokens=min_tokens, max_tokens=10**6)
    given_out = ""
    for count in range(1, len(ids) + 1):
        piece, ending = out.push(ids[count - 1])
        given_out += piece
        early = whole(ids[:min_tokens])
        late = whole(ids[:count])[len(early) :]
        expected, stop = cut(late, tuple(stops))
        if stop is not None:
            assert ending == Ending("stop", stop)
            assert given_out == early + expected
            assert out.finish(ending) == ("", ending)
            return
        assert ending is None
        certain = len(late) - needed(late, tuple(stops))
        assert given_out == whole(ids[: min(count, min_tokens)]) + late[:certain]
    assert given_out + out.finish(Ending("abort"))[0] == text


def whole(ids: list[int]) -> str:
    """The whole characters of the bytes among `ids`."""
    return bytes(i for i in ids if i < 256).decode(errors="ignore")


def test_five_thousand_random_streams_give_the_text_of_their_ids() -> None:
    """Row 8: split emoji, invalid bytes, stop strings across tokens."""
    generator = random.Random(8)
    tokenizer = ByteTokenizer()
    pool = [*b"ab#", *"é你😀".encode(), 0xFF, 0xC3, EOS]
    stopped = 0
    for _ in range(5000):
        ids = generator.choices(pool, k=generator.randint(1, 40))
        ids += "😀你é".encode()[: generator.randint(0, 9)]
        stops = tuple(
            "".join(generator.choices("ab#é你😀\ufffd", k=generator.randint(1, 4)))
            for _ in range(generator.randint(0, 3))
        )
        text, ending, used = run(output(stop=stops, max_tokens=len(ids)), ids)
        expected, stop = cut(tokenizer.decode(ids), stops)
        assert (text, ending.matched_stop) == (expected, stop), (ids, stops)
        assert ending.reason == ("length" if stop is None else "stop")
        assert used == len(ids) or stop is not None
        stopped += stop is not None
    assert 1000 < stopped < 4000
