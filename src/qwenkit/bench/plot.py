"""Tables of numbers as SVG pictures: lines over logarithmic axes, heat maps. No library needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 440, 64, 170, 40, 46
_COLUMN, _ROW, _BELOW = 64, 32, 60  # of a heat map
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")


def lines_svg(title: str, x_name: str, y_name: str, rows: Mapping[str, Mapping[int, float]]) -> str:
    """`rows` maps a line's name to its points, x to y, all positive; a line has a legend entry."""
    points = [(x, y) for row in rows.values() for x, y in row.items()]
    xs, ys = _span([float(x) for x, _ in points]), _span([y for _, y in points])
    parts = _begin(title, _WIDTH, _HEIGHT)
    for x in sorted({x for x, _ in points}):
        at = _across(x, xs)
        parts += [
            f'<path d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>',
            f'<text x="{at:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{x:,}</text>',
        ]
    for step in range(5):
        y = math.exp(ys[0] + (ys[1] - ys[0]) * step / 4)
        at = _down(y, ys)
        parts += [
            f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>',
        ]
    for number, (name, row) in enumerate(rows.items()):
        colour = _colour(number)
        path = " ".join(f"{_across(x, xs):.1f},{_down(row[x], ys):.1f}" for x in sorted(row))
        dash = ' stroke-dasharray="6 3"' if number >= len(_COLOURS) else ""
        y_legend = _TOP + 8 + 18 * number
        x_legend = _WIDTH - _RIGHT + 14
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
            f'<path d="M{x_legend} {y_legend}h20" stroke="{colour}" stroke-width="2"{dash}/>',
            f'<text x="{x_legend + 26}" y="{y_legend + 4}">{escape(name)}</text>',
        ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts += [
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def heat_svg(
    title: str, x_name: str, y_name: str, maps: Mapping[str, Mapping[int, Mapping[int, float]]]
) -> str:
    """A map below a map, each with its name: x to y to a share, 0.0 (red) to 1.0 (green)."""
    xs = sorted({x for grid in maps.values() for x in grid})
    ys = sorted({y for grid in maps.values() for column in grid.values() for y in column})
    height = _ROW * len(ys) + _BELOW  # of one map
    width = _LEFT + max(_COLUMN * len(xs) + 30, 8 * len(title))
    parts = _begin(title, width, _TOP + height * len(maps))
    for number, (name, grid) in enumerate(maps.items()):
        top = _TOP + height * number
        bottom = top + _ROW * len(ys)
        parts += [
            f'<text x="{_LEFT + _COLUMN * column + _COLUMN / 2}" y="{bottom + 16}" '
            f'text-anchor="middle">{x:,}</text>'
            for column, x in enumerate(xs)
        ]
        parts += [
            f'<text x="{_LEFT - 6}" y="{top + _ROW * row + 21}" text-anchor="end">{y}</text>'
            for row, y in enumerate(ys)
        ]
        parts += [
            _tile(_LEFT + _COLUMN * column, top + _ROW * row, grid[x][y])
            for column, x in enumerate(xs)
            for row, y in enumerate(ys)
            if y in grid.get(x, {})
        ]
        parts += [
            f'<text x="{_LEFT}" y="{bottom + 34}">{escape(name)}: {escape(x_name)}</text>',
            f'<text transform="translate(16 {(top + bottom) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _tile(x: int, y: int, share: float) -> str:
    """One square of a heat map with its share written in it."""
    low, middle, high = (213, 94, 0), (240, 228, 66), (0, 158, 115)
    first, last, at = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * at) for a, b in zip(first, last, strict=True))
    return (
        f'<rect x="{x}" y="{y}" width="{_COLUMN - 1}" height="{_ROW - 1}" '
        f'fill="rgb({red},{green},{blue})"/>'
        f'<text x="{x + _COLUMN / 2}" y="{y + 21}" text-anchor="middle">{share:.2f}</text>'
    )


def _begin(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]


def _span(values: list[float]) -> tuple[float, float]:
    """The logarithms of the smallest and the largest, never the same."""
    low, high = math.log(min(values)), math.log(max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _across(x: float, span: tuple[float, float]) -> float:
    share = (math.log(x) - span[0]) / (span[1] - span[0])
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _down(y: float, span: tuple[float, float]) -> float:
    share = (math.log(y) - span[0]) / (span[1] - span[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def bars_svg(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """`groups` maps a group's name to its bars, name to length, all positive; lengths from 0 on, a
    colour for each name.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    longest = max((value for group in groups.values() for value in group.values()), default=1.0)
    group_height = 14 * max(len(names), 1) + 8
    height = _TOP + group_height * len(groups) + 18 * len(names) + 20
    scale = (_WIDTH - _LEFT - 70) / longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for number, (group, bars) in enumerate(groups.items()):
        top = _TOP + number * group_height
        middle = top + group_height / 2
        parts.append(f'<text x="{_LEFT - 6}" y="{middle}" text-anchor="end">{escape(group)}</text>')
        for name, value in bars.items():
            row = top + 14 * names.index(name)
            end = _LEFT + value * scale
            parts += [
                f'<path d="M{_LEFT} {row + 6}H{end:.1f}" stroke="{_colour(names.index(name))}" '
                'stroke-width="12"/>',
                f'<text x="{end + 4:.1f}" y="{row + 10}" font-size="10">{value:.2f}</text>',
            ]
    for number, name in enumerate(names):
        row = _TOP + group_height * len(groups) + 18 * number + 8
        parts += [
            f'<path d="M{_LEFT} {row}h20" stroke="{_colour(number)}" stroke-width="12"/>',
            f'<text x="{_LEFT + 26}" y="{row + 4}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
