"""What a row of the board is, and what it gives. The rows are found by scanning their folder."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qwenkit.bench.reliability import rows
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from qwenkit.bench.reliability.board import Board

Size = Literal["quick", "full"]
_MB = 1e6

# Every row that there shall be; a number without a file is named as not here yet.
NAMES: Mapping[int, str] = {
    1: "malformed safetensors",
    2: "malformed GGUF",
    3: "hostile pickles",
    4: "path escape",
    5: "hostile templates",
    6: "role forging",
    7: "tokenizer time",
    8: "stream edges",
    9: "hostile requests",
    10: "schema fuzz",
    11: "poisonous neighbour",
    12: "disconnects",
    13: "memory pressure",
    14: "one greedy client",
    15: "hostile constraints",
    16: "tool-call parser",
    17: "size and overload",
    18: "keys, origins, hosts",
    19: "server killed",
    20: "soak",
    21: "NaN and overflow",
    22: "prompt too long",
    23: "kill -9 in training",
    24: "damaged training state",
    25: "bad rows, NaN loss",
    26: "model-written code",
    27: "hostile text in the page",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that did not keep the promise. `given` is what was done, as JSON can hold it: it is
    kept, so that a later run can try it again.
    """

    case: str
    detail: str
    given: Any = None


@dataclass(slots=True)
class Tally:
    """What a row counts while it runs. `figures` are further numbers worth keeping, by name;
    `unavailable` says why the row could not run here.
    """

    total: int = 0
    worst_s: float = 0.0
    worst_bytes: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    unavailable: str | None = None

    @property
    def passed(self) -> int:
        """Cases that kept the promise."""
        return self.total - len(self.failures)

    def check(self, case: str, passed: bool, detail: object = "", given: Any = None) -> bool:
        """Count a case; `detail` and `given` say what happened and to what, where it failed."""
        self.total += 1
        if not passed:
            self.failures.append(Failure(case, str(detail)[:1000], given))
        return passed

    def took(self, seconds: float) -> None:
        """Keep the longest time."""
        self.worst_s = max(self.worst_s, seconds)

    def used(self, count: int) -> None:
        """Keep the most memory, in bytes."""
        self.worst_bytes = max(self.worst_bytes or 0, count)

    def count(self, name: str, more: int = 1) -> None:
        """Add to a figure."""
        self.figures[name] = self.figures.get(name, 0) + more


Run = Callable[["Board", Tally], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. `run` does it and fills the tally that it is given; what it raises fails the row.

    `promise` says in one sentence what holds. A row that `needs_own_server` starts, kills or looks
    into the server's process, and cannot run at somebody else's.
    """

    id: int
    promise: str
    run: Run
    needs_own_server: bool = True

    @property
    def name(self) -> str:
        """As the board calls it."""
        return NAMES[self.id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row done."""

    row: Row
    size: Size
    seed: int
    seconds: float
    tally: Tally

    @property
    def holds(self) -> bool:
        """True when all cases kept the promise, and there were some."""
        return not self.tally.failures and self.tally.total > 0

    def line(self) -> str:
        """`id  name  pass/total  worst time  worst memory`."""
        return "  ".join(
            (f"{self.row.id:>2}", f"{self.row.name:<24}", f"{self.score():>12}", *self.worst())
        )

    def score(self) -> str:
        """`pass/total`, or that there is none."""
        if self.tally.unavailable is not None and not self.tally.total:
            return "not here"
        return f"{self.tally.passed}/{self.tally.total}"

    def worst(self) -> tuple[str, str]:
        """Longest time and most memory, with their units, in columns."""
        memory = self.tally.worst_bytes
        shown = "–" if memory is None else f"{memory / _MB:+.0f} MB"
        return f"{self.tally.worst_s:>8.2f} s", f"{shown:>9}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs."""
        tally = self.tally
        return {
            "row": self.row.id,
            "name": self.row.name,
            "promise": self.row.promise,
            "size": self.size,
            "seed": self.seed,
            "passed": tally.passed,
            "total": tally.total,
            "holds": self.holds,
            "seconds": round(self.seconds, 2),
            "worst_s": round(tally.worst_s, 4),
            "worst_bytes": tally.worst_bytes,
            "figures": tally.figures,
            "unavailable": tally.unavailable,
            "failures": [{"case": f.case, "detail": f.detail} for f in tally.failures],
        }


def find_rows() -> dict[int, Row]:
    """Every row by its number, from the files of the folder `rows`."""
    found: dict[int, Row] = {}
    for module in pkgutil.iter_modules(rows.__path__, f"{rows.__name__}."):
        row = importlib.import_module(module.name).ROW
        if row.id in found or row.id not in NAMES:
            raise UsageError(f"{module.name}: row {row.id} is there twice or has no name.")
        found[row.id] = row
    return dict(sorted(found.items()))


def chosen_rows(numbers: Iterable[int] | None) -> list[Row]:
    """Rows in the order of the board, all of them for None. Raises UsageError for unknown ones."""
    found = find_rows()
    wanted = set(found if numbers is None else numbers)
    for number in sorted(wanted - set(found)):
        known = ", ".join(map(str, found))
        name = NAMES.get(number)
        missing = f"{number} ({name}) is not here yet" if name else f"there is no row {number}"
        raise UsageError(f"rows: {missing}. Allowed: {known}.")
    return [row for number, row in found.items() if number in wanted]


def missing_rows() -> dict[int, str]:
    """Numbers and names of rows that are not here yet."""
    found = find_rows()
    return {number: name for number, name in NAMES.items() if number not in found}


def as_json_can_hold(value: object) -> Any:
    """`value`, or the text that Python writes for it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return repr(value)
