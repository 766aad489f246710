"""Options of one request are checked by name before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.api.inputs import request_options
from qwenkit.errors import RequestError
from qwenkit.types.options import RequestOptions


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"client": 3}, "client"),
        ({"cache_salt": None}, "cache_salt"),
        ({"priority": 1e30}, "priority"),
        ({"priority": 10**30}, "priority"),
        ({"priority": True}, "priority"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"adapter": 3}, "adapter"),
        ({"prio": 1}, "prio"),
        ({3: 1}, "3"),
        ("client", "options"),
    ],
)
def test_what_is_no_option_is_refused_by_name(given: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        request_options(given)
    assert error.value.field == field


def test_options_are_kept_as_given_and_may_be_missing() -> None:
    options = RequestOptions(client="a", priority=-3, timeout_s=2, adapter="b")
    assert request_options(options) is options
    assert options.timeout_s == 2.0
    assert request_options(None) == request_options({}) == RequestOptions()
