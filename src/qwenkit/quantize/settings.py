"""What a model is to be quantized to, and what that means for each of its matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenkit.errors import UsageError, suggest

METHODS = ("gptq", "awq", "rtn", "nf4", "int8")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
WHOLE_ROW = -1
_FIXED_BITS = {"nf4": 4, "int8": 8}


@dataclass(frozen=True, slots=True)
class Rule:
    """`bits` for every matrix whose path the regular expression `pattern` is found in; None: it
    keeps its numbers.
    """

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Of "down_proj=8" or "layers.0.=keep". Raises UsageError."""
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"rule: got {text!r}; expected PATTERN=BITS, such as 'down_proj=8'.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"rule: {pattern!r} is no regular expression: {error}.") from error
        if value == "keep":
            return cls(pattern, None)
        if value not in map(str, BITS):
            raise UsageError(f"rule: got {text!r}; allowed after '=': 2, 3, 4, 8 and keep.")
        return cls(pattern, int(value))


@dataclass(frozen=True, slots=True)
class Target:
    """What one matrix becomes; `group_size` columns share a scale."""

    bits: int
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """`method` chooses the numbers; `bits` and `group_size` (-1: the whole row) are how they are
    kept, except where a rule says otherwise. `damp` is the share of the mean of the Hessian's
    diagonal that is added to it; `act_order` takes columns by their weight in it. `symmetric` None:
    as the method usually is. Raises UsageError naming the setting on construction.
    """

    method: str = "gptq"
    bits: int | None = None
    group_size: int | None = None
    damp: float = 0.01
    act_order: bool = False
    symmetric: bool | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method: got {self.method!r}. {suggest(self.method, METHODS)}")
        fixed = _FIXED_BITS.get(self.method)
        if self.bits is not None and self.bits not in ((fixed,) if fixed else BITS):
            allowed = f"{self.method} has {fixed}" if fixed else "allowed: 2, 3, 4 and 8"
            raise UsageError(f"bits: got {self.bits}; {allowed}.")
        if self.group_size is not None:
            if fixed:
                raise UsageError(f"group_size: {self.method} has groups of its own; leave it out.")
            if self.group_size not in (*GROUP_SIZES, WHOLE_ROW):
                raise UsageError(
                    f"group_size: got {self.group_size}; choose one of 128, 64, 32, or -1 for rows."
                )
        if not 0 < self.damp < 1:
            raise UsageError(f"damp: got {self.damp}; expected a share between 0 and 1.")
        if self.act_order and self.method != "gptq":
            raise UsageError("act_order: only gptq takes columns in an order.")
        if self.symmetric is not None and fixed:
            raise UsageError(f"symmetric: {self.method} has levels of its own; leave it out.")
        if self.symmetric and self.method == "awq" and self.width == 4:
            raise UsageError("symmetric: AWQ files of 4 bits have zero points; leave it out.")
        if fixed and any(rule.bits is not None for rule in self.rules):
            raise UsageError(f"rule: {self.method} has {fixed} bits; only '=keep' can be used.")

    @property
    def width(self) -> int:
        """Bits of every matrix that no rule names."""
        return self.bits or _FIXED_BITS.get(self.method, 4)

    @property
    def is_symmetric(self) -> bool:
        """Whether zero stands in the middle of the levels."""
        return self.method != "awq" if self.symmetric is None else self.symmetric

    @property
    def needs_calibration(self) -> bool:
        """Whether the numbers depend on what passes through the model."""
        return self.method in ("gptq", "awq")

    @property
    def is_awq_layout(self) -> bool:
        """Whether files are AWQ's: four bits each. Other widths go into GPTQ's layout."""
        widths = {self.width, *(rule.bits for rule in self.rules if rule.bits is not None)}
        return self.method == "awq" and widths == {4}

    @property
    def is_v2(self) -> bool:
        """Whether GPTQ's files keep zero points as they are. Minus one, as the first version has
        them, those of groups that begin at zero have no place, and programs refuse such files.
        """
        return not self.is_symmetric

    @property
    def wanted_group(self) -> int | None:
        """Columns that share a scale where they divide the width (-1: the whole row); None of
        methods that have groups of their own.
        """
        return None if self.method in _FIXED_BITS else self.group_size or GROUP_SIZES[0]

    def targets(self, widths: Mapping[str, int]) -> dict[str, Target | None]:
        """What each matrix of a model becomes, from the columns of all of them by their paths;
        None: it keeps its numbers.

        AWQ's files have one group size: that of the matrices which do not keep their numbers.
        Raises UsageError naming a matrix that no group divides.
        """
        bits = {path: self._bits(path) for path in widths}
        made = {path: width for path, width in widths.items() if bits[path] is not None}
        wanted = self.wanted_group
        if wanted is None:
            groups = dict.fromkeys(made, WHOLE_ROW)
        elif self.is_awq_layout:
            groups = dict.fromkeys(made, fitting_group(made, wanted))
        else:
            groups = {path: fitting_group({path: width}, wanted) for path, width in made.items()}
        return {
            path: None if own is None else Target(own, groups[path]) for path, own in bits.items()
        }

    def check_rules(self, paths: Sequence[str]) -> None:
        """Raises UsageError for a rule that names none of the matrices at `paths`, or where all of
        them keep their numbers.
        """
        for rule in self.rules:
            if not any(re.search(rule.pattern, path) for path in paths):
                example = paths[-1]
                raise UsageError(f"rule: {rule.pattern!r} is in no path such as {example!r}.")
        if all(self._bits(path) is None for path in paths):
            raise UsageError("rule: every matrix keeps its numbers; there is nothing to quantize.")

    def _bits(self, path: str) -> int | None:
        bits: int | None = self.width
        for rule in self.rules:  # the last one that fits counts
            if re.search(rule.pattern, path):
                bits = rule.bits
        return bits

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what the defaults came to."""
        return {
            "method": self.method,
            "bits": self.width,
            "group_size": self.wanted_group,
            "damp": self.damp if self.method == "gptq" else None,
            "act_order": self.act_order,
            "symmetric": self.is_symmetric,
            "rules": [[rule.pattern, rule.bits] for rule in self.rules],
        }


def fitting_group(widths: Mapping[str, int], wanted: int) -> int:
    """The largest of 128, 64, 32 that is at most `wanted` and divides the columns of all matrices,
    given by their paths; -1 as it is.

    Raises UsageError naming the first matrix that none of them divides.
    """
    if wanted == WHOLE_ROW:
        return WHOLE_ROW
    for path, width in widths.items():
        if width % GROUP_SIZES[-1]:  # each is a multiple of the last
            raise UsageError(
                f"group_size: rows of {path} have {width} numbers, which no group of 32, 64 or "
                "128 divides; give -1 for one scale a row, or a rule that keeps it, such as "
                f"--rule '{path.rpartition('.')[2]}=keep'."
            )
    return next(
        size
        for size in GROUP_SIZES
        if size <= wanted and not any(w % size for w in widths.values())
    )
