"""Haystacks with needles in them: texts of an exact number of tokens, questions, and the scorer.

A needle is a sentence that says what the question asks for; the haystack knows nothing of it.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from qwenkit.errors import UsageError, suggest

CODE = "{code}"
# The end of a sentence with what closes it and the space behind it, in any script; or a line.
_SENTENCE = re.compile(r"(?:[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？｡।؟…]+[”’」』）]*|\n)\s*")
_LONGEST_SENTENCE = 1000  # characters on average; else the text does not mark its sentences
_MOST_CHARACTERS, _LEAST_CHARACTERS = 32, 4  # a token, where to end and where to start looking
_ENDS_SHORTENED = 48  # characters tried at the end where no whole text has the length exactly
_PADDING = ("", ".", " .", " . .", " . . .")


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence to hide and the answer to look for; "{code}" in both becomes a new number."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Hunt:
    """What is hidden in what, and what is asked: `sentences` are shuffled without end to make a
    haystack; with `text` that is repeated instead. `gap` stands between sentences.
    """

    instruction: str
    question: str
    needles: tuple[Needle, ...]
    gap: str
    sentences: tuple[str, ...] = ()
    text: str = ""

    def haystack(self, characters: int) -> str:
        """The first `characters` of the endless haystack."""
        if self.text:
            whole = self.text if self.text[-1].isspace() else f"{self.text}\n"
            return (whole * -(-characters // len(whole)))[:characters]
        noise = random.Random(0)
        parts: list[str] = []
        found = 0
        while found < characters:
            for sentence in noise.sample(self.sentences, len(self.sentences)):
                parts.append(sentence + self.gap)
                found += len(parts[-1])
        return "".join(parts)[:characters]


def languages() -> dict[str, Any]:
    """The built-in texts by language."""
    found: dict[str, Any] = json.loads(
        resources.files("qwenkit.bench").joinpath("haystacks.json").read_text("utf-8")
    )
    return found


def built_in(language: str, *, needles: int = 1, text: str = "") -> Hunt:
    """A hunt in a built-in language, for so many numbers, in its own haystack or in `text`.

    Raises UsageError for an unknown language or more needles than there are places.
    """
    known = languages()
    if language not in known:
        raise UsageError(f"language: got {language!r}. {suggest(language, known)}")
    words = known[language]
    subjects = words["subjects"][:needles]
    if not 1 <= needles <= len(words["subjects"]):
        raise UsageError(f"needles: got {needles}; allowed: 1 to {len(words['subjects'])}.")
    return Hunt(
        instruction=words["instruction"],
        question=words["question"].format(subjects=words["and"].join(subjects)),
        needles=tuple(
            Needle(words["needle"].format(subject=subject, code=CODE), CODE) for subject in subjects
        ),
        gap=words["gap"],
        sentences=tuple(words["sentences"]),
        text=text,
    )


def hidden(hunt: Hunt, haystack: str, key: str) -> tuple[Needle, ...]:
    """The needles of one cell: every "{code}" a number of five digits that `key` decides.

    Raises UsageError for an answer that the haystack or the question gives away.
    """
    known = f"{hunt.instruction} {haystack} {hunt.question}"
    needles: list[Needle] = []
    for number, needle in enumerate(hunt.needles):
        noise = random.Random(f"{key}/{number}")
        code = str(noise.randrange(10_000, 100_000))
        taken = " ".join(other.answer for other in needles)
        while CODE in needle.answer and is_in(code, f"{known} {taken}"):
            code = str(noise.randrange(10_000, 100_000))
        answer = needle.answer.replace(CODE, code)
        if is_in(answer, known):
            raise UsageError(f"answer: {answer!r} stands in the haystack or in the question.")
        needles.append(Needle(needle.text.replace(CODE, code), answer))
    return tuple(needles)


def spread(depth: int, count: int) -> list[float]:
    """Where `count` needles lie, as shares of the haystack: the first at `depth` percent, the
    others in equal steps between it and the end.
    """
    return [(depth + (100 - depth) * index / count) / 100 for index in range(count)]


def placed(haystack: str, needles: Sequence[Needle], depth: int, gap: str) -> str:
    """The haystack with its needles, each before the sentence whose beginning is nearest to its
    place; the last part of a sentence that was cut stays behind them. In a text whose sentences
    have no marks, before a word.
    """
    starts = [0, *(match.end() for match in _SENTENCE.finditer(haystack))]
    if len(starts) * _LONGEST_SENTENCE < len(haystack):
        starts = [0, *(match.end() for match in re.finditer(r"\s+", haystack))]
    parts: list[str] = []
    done = 0
    for needle, share in zip(needles, spread(depth, len(needles)), strict=True):
        start = _nearest(starts, share * len(haystack))
        before = haystack[done:start]
        between = gap if before and not before[-1].isspace() else ""
        parts += [before, between, needle.text, gap]
        done = start
    return "".join([*parts, haystack[done:]])


def _nearest(sorted_places: Sequence[int], wanted: float) -> int:
    after = bisect_left(sorted_places, wanted)
    near = sorted_places[max(0, after - 1) : after + 1]
    return min(near, key=lambda place: abs(place - wanted))


def exact_prompt(
    hunt: Hunt,
    *,
    depth: int,
    tokens: int,
    render: Callable[[str], Sequence[int]],
    key: str,
) -> tuple[Sequence[int], tuple[Needle, ...]]:
    """The ids of a prompt of exactly `tokens` tokens, and the needles in it.

    `render` makes ids of the user's message. The haystack is cut to the length, in the middle of a
    sentence where it must be. Raises UsageError when question and needles alone are longer.
    """
    haystack = hunt.haystack(tokens * _MOST_CHARACTERS)
    needles = hidden(hunt, haystack, key)

    def ids(cut: int, padding: str = "") -> Sequence[int]:
        text = placed(haystack[:cut], needles, depth, hunt.gap)
        return render(f"{hunt.instruction}\n\n{text}{padding}\n\n{hunt.question}")

    shortest = len(ids(0))
    if shortest > tokens:
        raise UsageError(
            f"length: question and needles alone are {shortest} tokens; the prompt has {tokens}."
        )
    cut = _longest_cut(lambda cut: len(ids(cut)), tokens, len(haystack))
    for found in _candidates(cut, ids):
        if len(found) == tokens:
            return found, needles
    raise UsageError(f"length: no haystack of this text makes a prompt of exactly {tokens} tokens.")


def _longest_cut(count: Callable[[int], int], tokens: int, characters: int) -> int:
    """The longest cut, of 0 to `characters`, whose prompt has at most `tokens` tokens; the count
    all but grows with the cut.
    """
    low, high = 0, min(tokens * _LEAST_CHARACTERS, characters)
    while count(high) <= tokens:
        if high == characters:
            return high
        low, high = high, min(2 * high, characters)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= tokens else (low, middle)
    return low


def _candidates(cut: int, ids: Callable[[int, str], Sequence[int]]) -> Iterator[Sequence[int]]:
    """Prompts about the wanted length, the one without padding and with the longest text first: a
    character of several tokens can leave a gap.
    """
    for shorter in range(min(cut, _ENDS_SHORTENED) + 1):
        for padding in _PADDING:
            yield ids(cut - shorter, padding)


def score(reply: str, needles: Sequence[Needle]) -> float:
    """The share of the answers that the reply has, 0.0 to 1.0."""
    return sum(is_in(needle.answer, reply) for needle in needles) / len(needles)


def is_in(answer: str, text: str) -> bool:
    """True when `text` has the answer, whatever its case and spacing; a number may be grouped by
    commas and must not be a part of a longer one.
    """
    folded = _folded(text)
    if not answer.isdecimal():
        return _folded(answer) in folded
    forms = "|".join({answer, f"{int(answer):,}"})
    return re.search(rf"(?<!\d)(?:{forms})(?!\d|,\d{{3}}(?!\d))", folded) is not None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
