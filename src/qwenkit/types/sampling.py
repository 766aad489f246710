"""How one request chooses its tokens and where it stops."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from qwenkit.errors import RequestError, suggest
from qwenkit.types.constraint import Constraint
from qwenkit.types.scripts import SCRIPTS

_MOST_BIASES = 1024  # entries of logit_bias
_MOST_STOPS = 1024  # entries of a list of stops: each is looked for at every token
_LONGEST_STOPS = 1 << 16  # characters, or ids, of all entries of such a list
_BIAS_MAPPING = "expected a mapping of token ids to numbers, like {13: -100}"
Stop = TypeVar("Stop", str, tuple[int, ...])
_MOST_PROMPT_LOGPROBS = 128  # a long prompt has so many beside each of its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopDetection:
    """When an output counts as a loop: its last tokens are one sequence of ids at least `repeats`
    times over, together at least `tokens` tokens. Sequences of up to `longest` tokens are found.

    Raises RequestError naming the field on construction.
    """

    repeats: int = 4
    tokens: int = 128
    longest: int = 256

    def __post_init__(self) -> None:
        for field, low, high in (("repeats", 2, 10**6), ("tokens", 2, 10**9), ("longest", 1, 4096)):
            number = whole_number(f"loop_detection.{field}", getattr(self, field), low, high)
            object.__setattr__(self, field, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off.
    `repetition_penalty` follows CTRL (arXiv 1909.05858) over prompt and output; presence and
    frequency penalties follow OpenAI's formula over the output. `max_tokens` None means: to the end
    of the context. `stop_token_sequences` are id sequences whose completion ends the output (the
    original's `stop_words_ids`). `logprobs` None reports none, k reports the chosen token and the k
    most likely ones; `prompt_logprobs` does so for every token of the prompt but the first.

    `logit_bias` is added to the logits of single tokens (-100 to 100, OpenAI's rule) after the
    penalties and before the temperature. It is given as a mapping of ids, or of their digits as
    JSON has them, to numbers and kept as pairs in the order of the ids.

    Two guards end an output, each with a finish reason of its own. `allowed_scripts` are names of
    Unicode scripts: no letter of another one is ever given out ("language"; what all scripts share
    is always allowed). `loop_detection`, True for its defaults, ends what only repeats itself
    ("loop"). `constraint` is what the whole text must be, a `Constraint` or a mapping of its one
    field.

    Numbers of any kind are taken, `stop` as one text or a list, and kept as plain Python values.
    Raises RequestError naming the field on construction.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_scripts: tuple[str, ...] = ()
    loop_detection: LoopDetection | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for field, low, high in _NUMBERS:
            self._set(field, number_between(field, getattr(self, field), low, high))
        for field, low_whole, high_whole in _WHOLE_NUMBERS:
            value = getattr(self, field)
            if value is not None or field in ("min_tokens", "top_k"):
                self._set(field, whole_number(field, value, low_whole, high_whole))
        self._set("stop", _stops("stop", _texts("stop", self.stop)))
        self._set("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        sequences = _items("stop_token_sequences", self.stop_token_sequences)
        ids = tuple(_ids("stop_token_sequences", each) for each in sequences)
        self._set("stop_token_sequences", _stops("stop_token_sequences", ids))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("allowed_scripts", _script_names(self.allowed_scripts))
        self._set("loop_detection", _loop_detection(self.loop_detection))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"expected true or false, got {self.ignore_eos!r}.")
        self._set("constraint", _constraint(self.constraint))
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty", "must be above 0 (1.0 switches it off).")
        if any(not sequence for sequence in self.stop_token_sequences):
            raise RequestError(
                "stop_token_sequences", "an empty sequence of ids would stop every output at once."
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens", f"{self.min_tokens} is above max_tokens {self.max_tokens}."
            )

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)  # the normalised value of a frozen field

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed; an unknown field is an error naming the nearest one."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise RequestError(name, f"unknown sampling option. {suggest(name, names)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error naming the nearest one."""
        for name in options:
            if not isinstance(name, str):
                raise RequestError("sampling", f"option names are text, got {name!r}.")
        return cls().replace(**options)


_NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
)
_MOST = 2**63 - 1
_WHOLE_NUMBERS = (
    ("max_tokens", 1, _MOST),
    ("min_tokens", 0, _MOST),
    ("top_k", 0, _MOST),
    ("logprobs", 0, _MOST),
    ("prompt_logprobs", 0, _MOST_PROMPT_LOGPROBS),
    ("seed", 0, _MOST),
)


def number_between(field: str, value: object, low: float, high: float) -> float:
    """A number of any kind (numpy's too) as a Python float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RequestError(field, f"expected a finite number, got {value!r}.")
    number = float(value)
    if not low <= number <= high:
        raise RequestError(field, f"got {value!r}; allowed: {low} to {high}.")
    return number


def whole_number(field: str, value: object, low: int, high: int = _MOST) -> int:
    """A whole number of any kind (numpy's too) as a Python int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(field, f"expected a whole number, got {value!r}.")
    number = int(value)
    if not low <= number <= high:
        end = "2^63 - 1" if high == _MOST else high
        raise RequestError(field, f"got {number}; allowed: {low} to {end}.")
    return number


def _constraint(given: object) -> Constraint | None:
    if given is None or isinstance(given, Constraint):
        return given
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise RequestError("constraint", f"expected a Constraint or a mapping, got {kind}.")
    return Constraint.from_mapping(given)


def _items(field: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RequestError(field, f"expected a list, got {value!r}.")
    return tuple(value)


def _texts(field: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _items(field, value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(field, f"expected texts that are not empty, got {text!r}.")
    return texts


def _stops(field: str, stops: tuple[Stop, ...]) -> tuple[Stop, ...]:
    """The same; a list that would hold up every step of the engine is refused."""
    if len(stops) > _MOST_STOPS:
        raise RequestError(field, f"got {len(stops)} entries; allowed: {_MOST_STOPS}.")
    length = sum(map(len, stops))
    if length > _LONGEST_STOPS:
        unit = "characters" if isinstance(stops[0], str) else "ids"
        raise RequestError(field, f"got {length} {unit} in all; allowed: {_LONGEST_STOPS}.")
    return stops


def _ids(field: str, value: object) -> tuple[int, ...]:
    return tuple(whole_number(field, item, 0) for item in _items(field, value))


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs of id and bias in the order of the ids, from a mapping or from such pairs."""
    if not isinstance(value, Mapping | list | tuple):
        raise RequestError("logit_bias", f"{_BIAS_MAPPING}, got {value!r}.")
    pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value)
    if len(pairs) > _MOST_BIASES:
        raise RequestError("logit_bias", f"got {len(pairs)} entries; allowed: {_MOST_BIASES}.")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RequestError("logit_bias", f"{_BIAS_MAPPING}, got an entry {pair!r}.")
        token_id = _token_id(pair[0])
        if token_id in biases:
            raise RequestError("logit_bias", f"token id {token_id} is there twice.")
        biases[token_id] = number_between("logit_bias", pair[1], -100.0, 100.0)
    return tuple(sorted(biases.items()))


def _token_id(key: Any) -> int:
    """An id, or its decimal digits, as an int."""
    is_written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
    return whole_number("logit_bias", int(key) if is_written else key, 0)


def _script_names(value: object) -> tuple[str, ...]:
    """Unicode's own spelling of script names, whatever their case and what joins their words."""
    names = []
    for text in _texts("allowed_scripts", value):
        name = _SCRIPT_NAMES.get(_plain(text))
        if name is None:
            raise RequestError(
                "allowed_scripts", f"{text!r} is no Unicode script. {suggest(text, SCRIPTS)}"
            )
        names.append(name)
    return tuple(names)


def _plain(name: str) -> str:
    return name.lower().translate({ord(joint): None for joint in "_- "})


_SCRIPT_NAMES = {_plain(name): name for name in SCRIPTS}


def _loop_detection(value: object) -> LoopDetection | None:
    """None for None or false, the defaults for true, fields from a mapping."""
    if value is None or value is False:
        return None
    if value is True:
        return LoopDetection()
    if isinstance(value, LoopDetection):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            "loop_detection", f"expected true, false or a mapping of its fields, got {value!r}."
        )
    names = [field.name for field in dataclasses.fields(LoopDetection)]
    for name in value:
        if name not in names:
            raise RequestError("loop_detection", f"{name!r} is unknown. {suggest(name, names)}")
    return LoopDetection(**value)
