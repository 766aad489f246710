"""The guards of an output, each against its definition in plain words."""

from __future__ import annotations

import random
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import engine, finish, request, text, tokens
from serving import run as serve

from fakes import EOS, ByteStream, ByteTokenizer
from qwenkit.engine.guards import LoopDetector, ScriptGuard
from qwenkit.engine.text import Ending, Output
from qwenkit.errors import RequestError
from qwenkit.types.sampling import LoopDetection, SamplingParams


def is_loop(tokens: list[int], detection: LoopDetection) -> bool:
    """The definition: the tail is one sequence over and over, often enough and long enough."""
    for period in range(1, detection.longest + 1):
        length = max(detection.tokens, detection.repeats * period)
        tail = tokens[-length:]
        if len(tail) == length and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False


def first_loop(tokens: list[int], detection: LoopDetection) -> int | None:
    """After how many of the tokens the detector says so."""
    detector = LoopDetector(detection)
    return next((n for n, token in enumerate(tokens, 1) if detector.push(token)), None)


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    head=st.lists(st.integers(0, 2), max_size=12),
    root=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    times=st.integers(1, 7),
    detection=st.builds(
        LoopDetection,
        repeats=st.integers(2, 5),
        tokens=st.integers(2, 20),
        longest=st.integers(1, 6),
    ),
)
def test_a_loop_is_seen_at_the_first_token_that_makes_it_one(
    head: list[int], root: list[int], times: int, detection: LoopDetection
) -> None:
    tokens = head + root * times
    expected = next((n for n in range(1, len(tokens) + 1) if is_loop(tokens[:n], detection)), None)
    assert first_loop(tokens, detection) == expected


def test_the_defaults_find_a_loop_of_a_paragraph_and_spare_what_only_looks_like_one() -> None:
    generator = random.Random(1)
    paragraph = [generator.randrange(50_000) for _ in range(256)]
    assert first_loop(paragraph * 5, LoopDetection()) == 4 * 256
    assert first_loop([*paragraph, *[9] * 200], LoopDetection()) == 256 + 128
    rows = [token for row in range(200) for token in (11, 12, 13, row, 14)]  # a table that counts
    assert first_loop(rows, LoopDetection()) is None
    assert first_loop([9] * 127, LoopDetection()) is None
    longer = [generator.randrange(50_000) for _ in range(257)]
    assert first_loop(longer * 6, LoopDetection()) is None  # beyond `longest`


def test_what_a_detector_keeps_and_does_is_bounded_by_the_longest_sequence() -> None:
    detector = LoopDetector(LoopDetection(longest=64, tokens=10**9))
    generator = random.Random(2)
    for step in range(20_000):
        assert not detector.push(generator.randrange(2) if step % 2 else generator.randrange(10**6))
        assert len(detector._equal) <= 64  # the steps that this token took
    assert len(detector._recent) == sum(map(len, detector._places.values())) == 64
    assert len(detector._places) <= 64


@pytest.mark.parametrize(
    ("scripts", "text", "allowed"),
    [
        (("Latin",), "Hello, wörld 5 µm — ½ 😀 x²\n\tª", None),
        (("Latin",), "print('привет')", "print('"),
        (("Latin",), "a 你好", "a "),
        (("Latin", "Han"), "a 你好 こ", "a 你好 "),
        (("Han", "Hiragana", "Katakana"), "コーヒーを飲む。", None),  # ー is Common
        (("Han", "Hiragana", "Katakana"), "コーヒーcafé", "コーヒー"),
        (("Cyrillic",), "да́ 𝑥 ℵ", None),  # a combining accent, mathematical letters
        (("Thai",), "สวัสดี ١٢٣", None),  # digits are no letters
        (("Common",), "12:30 a", "12:30 "),
        (("Latin",), "", None),
        (("Latin",), "ж", ""),
    ],
)
def test_text_is_allowed_up_to_the_first_letter_of_another_script(
    scripts: tuple[str, ...], text: str, allowed: str | None
) -> None:
    assert ScriptGuard(scripts).allowed(text) == (text if allowed is None else allowed)


def test_every_character_of_unicode_is_judged_by_its_own_script() -> None:
    guard = ScriptGuard(("Latin", "Han"))
    within = regex.compile(r"\p{Script=Latin}|\p{Script=Han}|\p{Script=Common}|\p{Script=Zinh}")
    for point in [*range(0x3400), *range(0x9F00, 0xD800), *range(0xF900, 0x12000)]:
        char = chr(point)
        if unicodedata.category(char) == "Cn":  # a newer Unicode may know it as a letter
            continue
        is_letter = unicodedata.category(char).startswith("L")
        assert bool(guard.allowed(char)) == (not is_letter or within.match(char) is not None), char


def output(*, max_tokens: int = 10**6, **sampling: object) -> Output:
    params = SamplingParams.from_mapping(sampling)
    return Output(ByteStream(), params, stop_ids={EOS: EOS}, max_tokens=max_tokens)


def run(out: Output, ids: list[int]) -> tuple[list[str], Ending, int]:
    """The pieces of text, the ending ("abort" where the ids run out), how many tokens it took."""
    pieces, ending = [], None
    for token_id in ids:
        piece, ending = out.push(token_id)
        pieces.append(piece)
        if ending is not None:
            break
    rest, ending = out.finish(ending or Ending("abort"))
    return [*pieces, rest], ending, out.tokens


LATIN = {"allowed_scripts": ("Latin",)}


def test_an_output_ends_before_the_letter_and_nothing_held_follows() -> None:
    ids = [*"aé#".encode(), *"жb".encode()]
    pieces, ending, used = run(output(**LATIN), ids)
    assert ("".join(pieces), ending, used) == ("aé#", Ending("language"), 6)
    pieces, ending, used = run(output(**LATIN, stop=("#ж!",)), ids)  # it may become a stop string…
    assert ("".join(pieces), ending) == ("aé#", Ending("language"))
    assert used == 7  # …until the next character says that it does not


def test_a_stop_string_is_no_output_and_so_may_be_of_any_script() -> None:
    ids = list("abконец".encode())
    pieces, ending, _ = run(output(**LATIN, stop=("конец",)), ids)
    assert ("".join(pieces), ending) == ("ab", Ending("stop", "конец"))
    pieces, ending, _ = run(output(**LATIN, stop=("ец",)), ids)
    assert ("".join(pieces), ending) == ("ab", Ending("language"))


@pytest.mark.parametrize("reason", ["abort", "error", "timeout"])
def test_what_is_still_held_at_the_end_is_guarded_too(reason: str) -> None:
    ids = list("abко".encode())
    pieces, ending, _ = run(output(**LATIN, stop=("конец",)), [*ids, EOS])
    assert ("".join(pieces), ending) == ("ab", Ending("language"))
    pieces, ending, _ = run(output(**LATIN, stop=("конец",), max_tokens=len(ids)), ids)
    assert ("".join(pieces), ending) == ("ab", Ending("language"))
    out = output(**LATIN, stop=("конец",))
    for token_id in ids:
        out.push(token_id)
    assert out.finish(Ending(reason)) == ("", Ending(reason))  # type: ignore[arg-type]


def test_min_tokens_puts_off_a_loop_and_never_another_script() -> None:
    pieces, ending, used = run(output(**LATIN, min_tokens=9), list("abжcdefghij".encode()))
    assert ("".join(pieces), ending, used) == ("ab", Ending("language"), 4)
    loop = {"loop_detection": {"repeats": 2, "tokens": 4}}
    assert run(output(**loop), list(b"xabab!"))[1:] == (Ending("loop"), 5)
    assert run(output(**loop, min_tokens=5), list(b"xababab!"))[1:] == (Ending("loop"), 6)
    assert run(output(**loop, min_tokens=5), list(b"xabab!!!"))[1:] == (Ending("abort"), 8)


def test_a_loops_text_is_given_out_and_other_endings_come_first() -> None:
    loop = {"loop_detection": {"repeats": 2, "tokens": 4}}
    pieces, ending, _ = run(output(**loop, stop=("b!",)), list(b"xabab"))
    assert ("".join(pieces), ending) == ("xabab", Ending("loop"))
    assert run(output(**loop, stop=("bab",)), list(b"xabab"))[1] == Ending("stop", "bab")
    assert run(output(**loop, max_tokens=5), list(b"xabab"))[1] == Ending("loop")
    sequences = (tuple(b"ab"),)
    assert run(output(**loop, min_tokens=4, stop_token_sequences=sequences), list(b"xabababab"))[
        1:
    ] == (Ending("loop"), 5)


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    text=st.text("ab é😀жк你", max_size=14),
    stops=st.lists(st.text("abжк你", min_size=1, max_size=3), max_size=3),
    cut=st.integers(0, 3),
)
def test_whatever_comes_no_forbidden_letter_is_given_out(
    text: str, stops: list[str], cut: int
) -> None:
    """Every byte is a token; the last characters may be cut in two, which makes U+FFFD of them."""
    ids = list(text.encode())
    ids = ids[: len(ids) - cut]
    guarded = run(output(**LATIN, stop=tuple(stops), max_tokens=max(len(ids), 1)), ids)
    plain = run(output(stop=tuple(stops), max_tokens=max(len(ids), 1)), ids)
    allowed = ScriptGuard(("Latin",)).allowed("".join(plain[0]))
    assert "".join(guarded[0]) == allowed
    assert ByteTokenizer().decode(ids).startswith(allowed)
    if allowed == "".join(plain[0]):
        assert guarded == plain
    else:
        assert guarded[1] == (Ending("language") if ids else Ending("abort"))


def test_the_engine_ends_what_goes_astray_and_its_neighbours_go_on() -> None:
    biased = {"logit_bias": {ord("a"): 100}, "ignore_eos": True}
    plain = request("plain", max_tokens=40, temperature=1.0, seed=1)
    events = serve(
        engine(),
        plain,
        request("loop", loop_detection={"repeats": 3, "tokens": 10}, **biased),
        request("script", allowed_scripts=("Greek",), **biased),
        request("allowed", allowed_scripts=("Latin",), max_tokens=5, **biased),
    )
    assert (text(events["loop"]), finish(events["loop"]).reason) == ("a" * 10, "loop")
    assert finish(events["loop"]).usage.completion_tokens == 10
    assert (text(events["script"]), finish(events["script"]).reason) == ("", "language")
    assert tokens(events["script"]) == [ord("a")]
    assert (text(events["allowed"]), finish(events["allowed"]).reason) == ("aaaaa", "length")
    assert events["plain"] == serve(engine(), plain)["plain"]


def test_a_bias_outside_the_vocabulary_is_refused_before_it_runs() -> None:
    served = engine()
    served.check(request("r", logit_bias={257: 1}))
    for token_id in (258, 271, 2**62):  # the model has rows up to 271, the tokenizer has not
        with pytest.raises(RequestError, match="outside the vocabulary") as error:
            served.add(request("r", logit_bias={str(token_id): 1}))
        assert error.value.field == "logit_bias"
    assert not served.has_work
