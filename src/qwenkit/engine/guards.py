"""What ends an output that goes astray: another language, and endless repetition.

Knows no tensor and no token's text beyond what it is given. Both are off unless a request asks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import regex

from qwenkit.types.sampling import LoopDetection


class ScriptGuard:
    """Knows which text has letters of `scripts` only (names as in `types.scripts`).

    Letters that Unicode counts to no single script ("Common", "Inherited"), digits, punctuation,
    symbols and marks are always allowed.
    """

    def __init__(self, scripts: Iterable[str]) -> None:
        names = sorted({*scripts, "Common", "Inherited"})
        within = "".join(rf"\p{{Script={name}}}" for name in names)
        self._other = regex.compile(rf"[\p{{Letter}}--[{within}]]", regex.VERSION1)

    def allowed(self, text: str) -> str:
        """`text` up to its first letter of another script; all of it if there is none."""
        found = self._other.search(text)
        return text if found is None else text[: found.start()]


class LoopDetector:
    """Says at which token an output has become a loop in the sense of `LoopDetection`.

    The tail has the period p for as long as every token equals the one p places earlier, so for
    each p a count of such tokens, one after another, tells how long that tail is. Only places of
    the same token within the last `longest` ones continue a count: a token costs at most that many
    steps and most cost few, and nothing older is kept.
    """

    def __init__(self, settings: LoopDetection) -> None:
        self._settings = settings
        self._length = 0
        self._places: defaultdict[int, deque[int]] = defaultdict(deque)  # of each recent token
        self._recent: deque[int] = deque()  # the last `longest` tokens
        self._equal: dict[int, int] = {}  # by period: tokens in a row that equal the earlier ones

    def push(self, token_id: int) -> bool:
        """Take one token; True when the tail that ends with it is a loop."""
        settings, now = self._settings, self._length
        equal = {now - place: 1 for place in self._places[token_id]}
        for period in equal:
            equal[period] += self._equal.get(period, 0)
        self._equal = equal
        self._remember(token_id)
        return any(
            period + count >= max(settings.tokens, settings.repeats * period)
            for period, count in equal.items()
        )

    def _remember(self, token_id: int) -> None:
        self._places[token_id].append(self._length)
        self._recent.append(token_id)
        self._length += 1
        if len(self._recent) > self._settings.longest:
            oldest = self._recent.popleft()
            places = self._places[oldest]
            places.popleft()
            if not places:
                del self._places[oldest]
