"""Bodies to values: what JSON does not allow is refused, whichever way they are read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.server.errors import ApiError
from qwenkit.server.json_body import MOST_LEVELS, MOST_OBJECTS, parse_json, read_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=40)
@given(values, st.sampled_from([None, 2]), st.booleans())
def test_both_ways_read_what_python_reads(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    try:
        body = text.encode()
    except UnicodeEncodeError:  # half a surrogate, which only an escape can bring in
        return
    if "\\ud" in text and any(0xD800 <= ord(c) <= 0xDFFF for c in str(value)):
        return
    assert parse_json(body) == parse_json(body, stepwise=True) == json.loads(text)


@given(st.text(alphabet='{}[]",:1e- \\n', max_size=30))
def test_both_ways_refuse_the_same(text: str) -> None:
    def outcome(stepwise: bool) -> Any:
        try:
            return parse_json(text.encode(), stepwise=stepwise)
        except ApiError as error:
            return error.status

    assert outcome(stepwise=True) == outcome(stepwise=False)


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-1e999]", "too large"),
        (b'{"a": "\xff"}', "not UTF-8 \\(byte 8\\)"),
        (b'["\\ud800"]', "half a surrogate"),
        (b'{"\\udc00": 1}', "half a surrogate"),
        (b'{"a": 1,}', "line 1"),
        (b'{"a" 1}', "delimiter"),
        (b"{1: 2}", "property name"),
        (b"[1 2]", "delimiter"),
        (b"[1] 2", "Extra data"),
        (b'"a\nb"', "control character"),
        (b"[" * 200_000, "nested"),
        (b"[" * (MOST_LEVELS + 1) + b"]" * (MOST_LEVELS + 1), "nested"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "nested"),
        (b"1" * 5000, "digits"),
        (b"[" + b"{}," * MOST_OBJECTS + b"{}]", "objects"),
        (b'{"a":', "line 1"),
        (b"[", "line 1"),
    ],
)
def test_what_is_no_json_is_refused(body: bytes, words: str, stepwise: bool) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse_json(body, stepwise=stepwise)
    assert caught.value.status == 400


def test_nul_and_pairs_of_surrogates_are_text() -> None:
    assert parse_json(b'["a\\u0000b", "\\ud83d\\ude00"]') == ["a\0b", "😀"]
    levels = MOST_LEVELS
    assert parse_json(b"[" * levels + b"]" * levels)


def test_a_body_of_very_many_values_leaves_the_event_loop_free() -> None:
    body = json.dumps({"prompt": list(range(300_000))}).encode()

    async def turns() -> int:
        reading = asyncio.create_task(read_json(body))
        count = 0
        while not reading.done():
            await asyncio.sleep(0)
            count += 1
        assert len((await reading)["prompt"]) == 300_000
        return count

    assert asyncio.run(turns()) > 10  # at once it would be two
