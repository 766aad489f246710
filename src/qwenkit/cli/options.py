"""The options that several commands share, and their reading into plain values."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.errors import UsageError, suggest

DEFAULT_MODEL = "default"
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPUTE = ("auto", "reference")
SPECULATIONS = ("none", "prompt-lookup")
KV_DTYPES = ("auto", "fp32", "bf16", "int8", "int4")
_KINDS = "int4, int8, bf16 or fp32"

ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name on the hub, folder or .gguf file. [default: the embedded model]",
    ),
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
        help=f"auto: as stored; {_KINDS}: every matrix rounded to it while loading; nf4, fp4, "
        "nf4-double, fp4-double, llm-int8: as bitsandbytes does, embedding and head as stored.",
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
        "[default: int8 with int4, as stored with bitsandbytes' kinds, else the same]",
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
        help="What keys and values are kept in: fp32, bf16, int8 or int4; auto: bf16 where "
        "weights are int4, int8 or bf16, else as activations.",
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

Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="[NAME=]PATH",
        help="A LoRA adapter in PEFT's layout, a folder or a name on the hub, to answer with.",
    ),
]
Speculation = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="prompt-lookup: guess what comes next from what was said before; the answer stays "
        "the same, copied passages come faster. [none, prompt-lookup]",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model of the same vocabulary that guesses; the answer stays the same.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit on the hub. [default: main]"),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a command loads its model, but for adapters; see `qwenkit.cli.grouped`."""

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
    speculation: Speculation = "none"
    draft: Draft = None
    revision: Revision = None
    offline: Offline = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(LoadOptions):
    """The same for a command that answers with one adapter."""

    adapter: Adapter = None


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
