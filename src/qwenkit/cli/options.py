"""The options that several commands share, and their reading into plain values.

Sampling options left out stay None and change nothing: the defaults come with the model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from qwenkit.errors import RequestError, UsageError, suggest
from qwenkit.types.constraint import Constraint
from qwenkit.types.sampling import SamplingParams

DEFAULT_MODEL = "default"
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPUTE = ("auto", "reference")
KV_DTYPES = ("auto", "fp32", "bf16", "int8")
_KINDS = "int4, int8, bf16 or fp32"
_SAMPLING = "[default: the model's own]"

ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name on the hub, folder or .gguf file. [default: the embedded model]",
    ),
]
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
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Always the most likely token: --temperature 0.")
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU threads. [default: the machine's cores]"),
]
PinThreads = Annotated[
    bool, typer.Option("--pin-threads", help="Give each helper thread a core of its own.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Activations: auto, float32, bfloat16, or float16 on what is no processor.",
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where the model is: cpu, cuda, cuda:1, xpu, npu, mps, or auto, the accelerators if "
        "there are any.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help='Split between layers: auto, or JSON like {"": "cuda:0", "lm_head": "cpu"}.',
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help=f"auto: as stored; {_KINDS}: every matrix rounded to it while loading.",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With int4 or int8, columns to a scale: 32, 64 or 128. "
        "[default: 32 for int4, 128 for int8]",
    ),
]
HeadWeights = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help=f"With --weights, what embedding and head become: {_KINDS}. "
        "[default: int8 with int4, else the same]",
    ),
]
Compute = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto: fastest kernels; reference: plain, unquantized ones."),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Context in tokens; more than the model's own extends it. [default: the model's own]",
    ),
]
KvDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What keys and values are kept in: fp32, bf16 or int8; auto: bf16 where weights are "
        "int4, int8 or bf16, else as activations.",
    ),
]
Rope = Annotated[
    str,
    typer.Option(
        metavar="WHEN",
        help="Beyond the trained length: per-request, only for what needs it; as-config, always.",
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use only models that are already on this machine.")
]

Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit on the hub. [default: main]"),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a command loads its model; see `qwenkit.cli.grouped`."""

    threads: Threads = None
    pin_threads: PinThreads = False
    dtype: Dtype = "auto"
    weights: Weights = "auto"
    group_size: GroupSize = None
    head_weights: HeadWeights = None
    compute: Compute = "auto"
    device: DeviceName = "cpu"
    device_map: DeviceMap = None
    context: Context = None
    kv_dtype: KvDtype = "auto"
    rope: Rope = "per-request"
    revision: Revision = None
    offline: Offline = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How a command samples; see `qwenkit.cli.grouped`."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    stop: Stop = None
    greedy: Greedy = False

    def changes(
        self, *, max_tokens: int | None, seed: int | None, logprobs: int | None = None
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
            "max_tokens": max_tokens,
            "stop": tuple(self.stop) if self.stop else None,
            "seed": seed,
            "logprobs": logprobs,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        SamplingParams.from_mapping(changes)
        return changes


def for_model(
    defaults: SamplingParams, changes: Mapping[str, Any], *, longest: int
) -> SamplingParams:
    """A model's own sampling with `changes`; at most `longest` tokens where neither says."""
    sampling = defaults.replace(**changes)
    return sampling if sampling.max_tokens else sampling.replace(max_tokens=longest)


def parse_setting(name: str, text: str) -> Any:
    """The value of the sampling option `name` written as `text`, read by the option's own type.

    "none" empties an option that can be empty; lists are JSON. Nothing is ever evaluated. Raises
    RequestError: an unknown name (with the nearest), or a text that is not of that type.
    """
    kinds = get_type_hints(SamplingParams)
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    if name not in names:
        raise RequestError(name, f"unknown sampling option. {suggest(name, names)}")
    kind = kinds[name]
    if kind in (int | None, Constraint | None) and text.lower() == "none":
        return None
    try:
        return _READERS[kind](text)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(name, f"expected {_EXPECTED[kind]}, got {text!r}.") from error


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_strings(text: str) -> tuple[str, ...]:
    items = _read_list(text) if text.startswith("[") else [text]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(text)
    return tuple(items)


def _read_ids(text: str) -> tuple[int, ...]:
    return _ids(_read_list(text if text.startswith("[") else f"[{text}]"))


def _read_sequences(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(item) for item in _read_list(text))


def _read_list(text: str) -> list[Any]:
    try:
        items = json.loads(text)
    except RecursionError as error:
        raise ValueError(text) from error
    if not isinstance(items, list):
        raise ValueError(text)
    return items


def _ids(items: Any) -> tuple[int, ...]:
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise ValueError(items)
    return tuple(items)


_READERS: dict[Any, Any] = {
    int: int,
    int | None: int,
    float: float,
    bool: _read_bool,
    tuple[str, ...]: _read_strings,
    tuple[int, ...]: _read_ids,
    tuple[tuple[int, ...], ...]: _read_sequences,
    Constraint | None: Constraint.from_json,
}
_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number or none",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: 'one text or a JSON list of texts, like ["\\n", "User:"]',
    tuple[int, ...]: "token ids, like 13,198",
    tuple[tuple[int, ...], ...]: "a JSON list of id lists, like [[13, 198]]",
    Constraint | None: 'a constraint as JSON, like {"choice": ["yes", "no"]}, or none',
}


def one_of(given: Mapping[str, str | None]) -> str | None:
    """The one value given under several names (name → value or None); None when there is none.

    Raises UsageError when two differ.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        pairs = " and ".join(f"{name} {value!r}" for name, value in values.items())
        raise UsageError(f"Got both {pairs}; give one.")
    return next(iter(values.values()), None)


def check_model_name(name: str | None, *, takes_prompt: bool = False) -> str:
    """The name given, or the default model's for None.

    Catches the slip of giving the prompt where the model is expected: raises UsageError.
    """
    if name is None:
        return DEFAULT_MODEL
    if not name or (any(c.isspace() for c in name) and not Path(name).exists()):
        advice = (
            "Give the model first, or the question by --prompt."
            if takes_prompt
            else "Give a folder, a .gguf file or a hub name such as 'Qwen/Qwen2-0.5B-Instruct'."
        )
        raise UsageError(f"{name!r} is no model name. {advice}")
    return name


def check_names_a_hub(name: str, given: Mapping[str, object]) -> None:
    """Refuse options of a hub (option → value or None) for a model that comes from none.

    Raises UsageError.
    """
    options = " and ".join(option for option, value in given.items() if value is not None)
    if not options:
        return
    if name == DEFAULT_MODEL:
        raise UsageError(f"{options}: the embedded model comes from no hub. Leave it out.")
    if is_local(name):
        raise UsageError(f"{options}: {name!r} is on this machine, no hub is asked. Leave it out.")


def is_local(name: str) -> bool:
    """True for the path of something that exists."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, or a NUL in it
        return False


def check_name(option: str, name: str, allowed: Iterable[str]) -> None:
    """Raises UsageError, with the nearest allowed name, unless `name` is one of them."""
    allowed = tuple(allowed)
    if name not in allowed:
        raise UsageError(f"{option}: got {name!r}. {suggest(name, allowed)}")


def check_text(source: str, text: str) -> str:
    """`text` if it is Unicode; the command line hands over bytes that are not UTF-8 as surrogates.

    Raises UsageError naming its `source`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{source} is not UTF-8 text (character {error.start + 1}).") from error
    return text


def read_text_file(source: str, path: Path) -> str:
    """The whole of a UTF-8 text file. Raises UsageError naming its `source`."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} {str(path)!r} is not UTF-8 text (byte {error.start + 1})."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{source} {str(path)!r} cannot be read: {reason}.") from error


def read_standard_input(*, instead: str = "by --prompt") -> str:
    """All that is piped in, as UTF-8 text. Raises UsageError when it is no text or empty, saying
    how a text is given `instead`.
    """
    try:
        text = "" if sys.stdin is None else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"Standard input is not UTF-8 text (byte {error.start + 1}).") from error
    if not text.strip():
        raise UsageError(f"Standard input is empty. Pipe a text in, or give it {instead}.")
    return text
