"""The filters of chat templates that make text, over marked text. Knows nothing of Jinja.

Each takes the run and the value first, then what the filter of the same name takes in Jinja; `None`
comes from a missing argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from qwenkit.chat.guard import Guarded
from qwenkit.chat.values import Run
from qwenkit.errors import TemplateError

_MAX_DECIMALS = 20
_MAX_DATE_FORM = 64


def _owned(run: Run, value: object) -> Guarded:
    return run.guard.own(run.text(value))


def trim(run: Run, value: object, chars: str | None = None) -> str:
    """The text without white space, or `chars`, at both ends."""
    return _owned(run, value).strip(chars)


def lower(run: Run, value: object) -> str:
    """The text in lower case."""
    return _owned(run, value).lower()


def upper(run: Run, value: object) -> str:
    """The text in upper case."""
    return _owned(run, value).upper()


def capitalize(run: Run, value: object) -> str:
    """The first character in upper case, the others in lower case."""
    return _owned(run, value).capitalize()


def title(run: Run, value: object) -> str:
    """Every word with an upper-case first character."""
    return _owned(run, value).title()


def replace(run: Run, value: object, old: str, new: str, count: int | None = None) -> str:
    """The text with `old` replaced by `new`, at most `count` times."""
    limit = -1 if count is None else count
    return _owned(run, value).replace(run.text(old), run.text(new), limit)


def join(run: Run, values: Iterable[object], d: object = "", attribute: object = None) -> str:
    """The printed values with `d` between them; of mappings, their item `attribute`."""
    if attribute is not None:
        values = [v[attribute] if isinstance(v, Mapping) else v for v in values]
    return _owned(run, d).join(map(run.text, values))


def indent(
    run: Run, value: object, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    """The text with every line but the first (unless `first`) moved right; empty lines are left
    alone unless `blank`.
    """
    margin = run.guard.own(width) if isinstance(width, str) else run.guard.own(" ") * width
    lines = run.guard.own(_owned(run, value) + "\n").splitlines()
    run.guard.check_length(sum(map(len, lines)) + len(lines) * (len(margin) + 1))
    moved = [margin + line if blank or line else line for line in lines[1:]]
    start = margin + lines[0] if first else lines[0]
    return run.guard.own("\n").join([start, *moved])


def string(run: Run, value: object) -> str:
    """What the value prints."""
    return run.text(value)


def tojson(
    run: Run,
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The value as JSON, not escaped for HTML, as the published templates expect."""
    return run.json(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def percent(run: Run, value: str, *args: object, **kwargs: object) -> str:
    """`value % args`."""
    return run.percent(run.text(value), kwargs or args)


def to_int(run: Run, value: object, default: int = 0, base: int = 10) -> int:
    """The value as a whole number, or `default`."""
    plain = run.guard.plain(value) if isinstance(value, str) else value
    try:
        if isinstance(plain, str) and base != 10:
            return int(plain, base)
        return int(plain if isinstance(plain, str | int | float) else "")
    except (ValueError, OverflowError):
        number = to_float(run, value, math.nan)
        return int(number) if math.isfinite(number) else default


def to_float(run: Run, value: object, default: float = 0.0) -> float:
    """The value as a number, or `default`."""
    plain = run.guard.plain(value) if isinstance(value, str) else value
    try:
        return float(plain if isinstance(plain, str | int | float) else "")
    except (ValueError, OverflowError):
        return default


def rounded(run: Run, value: float, precision: int = 0, method: str = "common") -> float:
    """The number rounded to `precision` decimals: "common", "ceil" or "floor"."""
    if method not in ("common", "ceil", "floor") or abs(precision) > _MAX_DECIMALS:
        raise TemplateError(
            f"round: got precision {precision} and method {method!r}; allowed: up to "
            f"{_MAX_DECIMALS} decimals and common, ceil or floor."
        )
    if method == "common":
        return float(round(value, precision))
    scaled = value * 10.0**precision
    return (math.ceil(scaled) if method == "ceil" else math.floor(scaled)) / 10.0**precision


def total(run: Run, values: Iterable[Any], attribute: object = None, start: float = 0) -> Any:
    """The sum of numbers; of mappings, of their item `attribute`."""
    numbers = [v[attribute] if isinstance(v, Mapping) else v for v in values]
    if not all(isinstance(n, int | float) for n in [start, *numbers]):
        raise TemplateError("sum: expected numbers.")
    return sum(numbers, start)


def same(run: Run, value: object) -> object:
    """The value itself: templates are never escaped for HTML, so everything is `safe`."""
    return value


def strftime_now(form: str) -> str:
    """Now, in local time, in the form of `datetime.strftime`: a function, not a filter."""
    if len(form) > _MAX_DATE_FORM:
        raise TemplateError(f"strftime_now: a form may have {_MAX_DATE_FORM} characters.")
    return datetime.now().strftime(form)


TEXT_FILTERS: Mapping[str, Callable[..., Any]] = {
    "capitalize": capitalize,
    "float": to_float,
    "format": percent,
    "indent": indent,
    "int": to_int,
    "join": join,
    "lower": lower,
    "replace": replace,
    "round": rounded,
    "safe": same,
    "string": string,
    "sum": total,
    "title": title,
    "tojson": tojson,
    "trim": trim,
    "upper": upper,
}
