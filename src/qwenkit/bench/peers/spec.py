"""What an engine is to the bench: the work it is given, the options it is made with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

PROMPT_TOKENS = 8  # before a decode measurement that asks for no deeper context
_FIRST_ID = 1000  # past bytes and control tokens, in a vocabulary that is large enough

WeightName = Literal["int4", "int8", "bf16", "fp32"]
WEIGHTS: tuple[WeightName, ...] = ("int4", "int8", "bf16", "fp32")


def prompt_ids(tokens: int, vocab_size: int, stream: int = 0) -> list[int]:
    """`tokens` ids below `vocab_size`, round and round from an ordinary one, by stream another."""
    return [(_FIRST_ID + 17 * stream + i) % vocab_size for i in range(tokens)]


@dataclass(frozen=True, slots=True)
class Work:
    """One measurement: "prefill" of `tokens` in one prompt, or "decode" of `tokens` in each of
    `streams` sequences that have `context` tokens already.
    """

    measure: Literal["prefill", "decode"]
    tokens: int
    streams: int = 1
    context: int = PROMPT_TOKENS

    @property
    def name(self) -> str:
        """How reports call it: "prefill", "decode", "decode_8_streams", "decode_at_2048"."""
        name: str = self.measure
        if self.streams > 1:
            name += f"_{self.streams}_streams"
        if self.measure == "decode" and self.context != PROMPT_TOKENS:
            name += f"_at_{self.context}"
        return name

    @property
    def positions(self) -> int:
        """Tokens that each stream's cache must hold, one to spare."""
        return self.tokens + 1 + (self.context if self.measure == "decode" else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, counted from the start of its load, and how long it is."""

    at_s: float
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that come one after another, whether or not the engine keeps up; with `at_most` one
    waits until fewer than so many are being answered, as clients in a closed loop do.
    """

    arrivals: tuple[Arrival, ...]
    at_most: int | None = None

    @property
    def most_prompt_tokens(self) -> int:
        """The longest prompt."""
        return max(arrival.prompt_tokens for arrival in self.arrivals)

    @property
    def most_positions(self) -> int:
        """The longest request, prompt and answer."""
        return max(arrival.prompt_tokens + arrival.tokens for arrival in self.arrivals)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        arrivals = tuple(Arrival(**arrival) for arrival in data["arrivals"])
        return cls(arrivals, data.get("at_most"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSetting:
    """How weights are held: `group_size` numbers share a scale; `head` is how the output matrix
    is held (None: as the engine does by itself).
    """

    name: WeightName
    group_size: int = 128
    head: WeightName | None = None

    @property
    def label(self) -> str:
        """As tables and folders call it: "int4-g128", "int4-g32-head-int8", "bf16"."""
        label: str = self.name
        if self.name in ("int4", "int8"):
            label += f"-g{self.group_size}"
        return label if self.head is None else f"{label}-head-{self.head}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an engine must be ready for. `compute` is for our own only; `serves`: what it is given
    are loads.
    """

    threads: int
    most_prompt_tokens: int
    most_positions: int
    most_streams: int = 1
    weights: WeightSetting | None = None
    compute: str = "auto"
    serves: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        weights = data.pop("weights")
        return cls(weights=weights and WeightSetting(**weights), **data)


class Engine(Protocol):
    """What is measured. `setting` says in a few words how it really holds the weights."""

    version: str
    setting: str

    def prefill(self, tokens: int) -> float:
        """Seconds until the first token after a prompt of `tokens` is chosen."""

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """Seconds in which each of `streams` sequences goes on by `tokens` after `context`."""


class Server(Protocol):
    """An engine that can be given a load."""

    def play(self, load: Load) -> list[list[float]]:
        """For each request, when each of its tokens came, in seconds from the start of the load."""


def unsupported(engine: str, weights: WeightSetting) -> RuntimeError:
    """The error of an engine that cannot hold weights so."""
    return RuntimeError(f"{engine} cannot hold weights as {weights.label}")
