"""How a command samples: options left out stay None, for the defaults come with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from qwenkit.errors import UsageError
from qwenkit.types.sampling import SamplingParams

_SAMPLING = "[default: the model's own]"

Temperature = Annotated[
    float | None,
    typer.Option(metavar="X", help=f"Randomness; 0 takes the most likely token. {_SAMPLING}"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help=f"Keep the likeliest tokens up to this probability; 1 is off. {_SAMPLING}",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Keep this many likeliest tokens; 0 is off. {_SAMPLING}"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="X", help=f"Drop tokens below this share of the likeliest; 0 is off. {_SAMPLING}"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help=f"Above 1 discourages repeated tokens; 1 is off. {_SAMPLING}"),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=X",
        help="Add X, -100 to 100, to the logit of a token id; may be given several times.",
    ),
]
AllowedScripts = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="End before a letter of any other Unicode script, for example Latin,Han.",
    ),
]
LoopDetection = Annotated[
    bool, typer.Option("--loop-detection", help="End an output that only repeats itself.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Always the most likely token: --temperature 0.")
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help=f"Taken from the logits of what was said, -100 to 100; 0 is off. {_SAMPLING}",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X", help=f"The same, once for every time they were said; 0 is off. {_SAMPLING}"
    ),
]
MinTokens = Annotated[
    int | None, typer.Option(metavar="N", help="No end before so many tokens. [default: 0]")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after the model's own end of text.")
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How a command samples; see `qwenkit.cli.grouped`."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    min_tokens: MinTokens = None
    ignore_eos: IgnoreEos = False
    logit_bias: LogitBias = None
    stop: Stop = None
    allowed_scripts: AllowedScripts = None
    loop_detection: LoopDetection = False
    greedy: Greedy = False

    def changes(
        self,
        *,
        max_tokens: int | None,
        seed: int | None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> dict[str, Any]:
        """The options that were given, as changes to a model's sampling defaults.

        Raises RequestError naming the one that is out of range: now, not after the model is loaded.
        """
        if self.greedy and self.temperature not in (None, 0.0):
            raise UsageError(
                f"--greedy is --temperature 0; {self.temperature} was also given. Drop one."
            )
        given = {
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": True if self.ignore_eos else None,
            "logit_bias": _biases(self.logit_bias),
            "max_tokens": max_tokens,
            "stop": tuple(self.stop) if self.stop else None,
            "allowed_scripts": _names(self.allowed_scripts),
            "loop_detection": True if self.loop_detection else None,
            "seed": seed,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        SamplingParams.from_mapping(changes)
        return changes


def _biases(items: list[str] | None) -> tuple[tuple[str, float], ...] | None:
    """Pairs of id and bias. Raises UsageError for what is not written ID=X."""
    if not items:
        return None
    pairs = []
    for item in items:
        token_id, _, bias = item.partition("=")
        try:
            pairs.append((token_id.strip(), float(bias)))
        except ValueError as error:
            raise UsageError(f"--logit-bias: got {item!r}; write ID=X, like 13=-100.") from error
    return tuple(pairs)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def for_model(
    defaults: SamplingParams, changes: Mapping[str, Any], *, longest: int
) -> SamplingParams:
    """A model's own sampling with `changes`; at most `longest` tokens where neither says."""
    sampling = defaults.replace(**changes)
    return sampling if sampling.max_tokens else sampling.replace(max_tokens=longest)
