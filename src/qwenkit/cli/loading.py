"""Opening a model for a command, with something to watch meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from qwenkit.cli import console, download, options
from qwenkit.errors import UsageError
from qwenkit.types.extension import ROPE_MODES

if TYPE_CHECKING:
    from qwenkit.api import LLM, AsyncLLM
    from qwenkit.api.session import Session
    from qwenkit.parallel import GivenMap

Model = TypeVar("Model", bound="Session")
_OPTIONS = {
    "context_tokens": "--context",
    "kv_cache_tokens": "--context",
    "kv_dtype": "--kv-dtype",
    "threads": "--threads",
    "rope": "--rope",
    "dtype": "--dtype",
    "weights": "--weights",
    "group_size": "--group-size",
    "head_weights": "--head-weights",
    "compute": "--compute",
    "device": "--device",
    "device_map": "--device-map",
    "speculation": "--speculation",
    "draft": "--draft",
    "users": "--users",
    "tokens": "--tokens",
    "devices": "--devices",
}


def load_model(name: str, given: options.ModelOptions | None = None) -> LLM:
    """Find (or download) and load a model.

    Raises what `qwenkit.api.LLM` raises, with the names of the command line's options.
    """
    given = given or options.ModelOptions()
    adapters = {} if given.adapter is None else read_adapter_option(given.adapter)
    llm = _load(_llm, name, given, adapters, None)
    llm.default_adapter = next(iter(adapters), None)
    return llm


def load_served_model(
    name: str, given: options.LoadOptions, adapters: Mapping[str, str], kv_cache_tokens: int | None
) -> AsyncLLM:
    """The same for asyncio code, with adapters beside the model that requests name."""
    return _load(_async_llm, name, given, adapters, kv_cache_tokens)


def _load(
    kind: Callable[[], type[Model]],
    name: str,
    given: options.LoadOptions,
    adapters: Mapping[str, str],
    kv_cache_tokens: int | None,
) -> Model:
    options.check_names_a_hub(name, {"--revision": given.revision})
    device_map = _check(given)
    from qwenkit.checkpoint.hub import resolve  # a tenth of a second that --help does without

    with download.bars() as progress:
        resolve(name, offline=given.offline, revision=given.revision, progress=progress)
        for other in (*adapters.values(), *([given.draft] if given.draft else [])):
            resolve(other, offline=given.offline, progress=progress)
    with console.progress(f"Loading {name} / 正在加载模型 …") as show, options_named():
        llm = kind()(
            name,
            dtype=given.dtype,
            weights=given.weights,
            group_size=given.group_size,
            head_weights=given.head_weights,
            compute=given.compute,
            device=given.device,
            device_map=device_map,
            threads=given.threads,
            pin_threads=given.pin_threads,
            context_tokens=given.context,
            kv_cache_tokens=kv_cache_tokens,
            kv_dtype=given.kv_dtype,
            rope=given.rope,
            adapters=adapters,
            speculation=given.speculation,
            draft=given.draft,
            offline=given.offline,
            revision=given.revision,
            progress=show,
        )
    if not isinstance(llm.devices, str):
        console.note(f"{llm.devices}.")
    return llm


def _llm() -> type[LLM]:
    from qwenkit.api import LLM  # torch takes seconds; something moves already

    return LLM


def _async_llm() -> type[AsyncLLM]:
    from qwenkit.api import AsyncLLM

    return AsyncLLM


def read_adapter_option(given: str) -> dict[str, str]:
    """The value of --adapter, NAME=PATH or a path alone, whose last step is then the name.

    Raises UsageError.
    """
    name, equals, path = given.partition("=")
    if not equals or "/" in name or options.is_local(given):
        name, path = given.rstrip("/").rpartition("/")[2], given
    if not name or not path:
        raise UsageError(f"--adapter: got {given!r}; expected PATH or NAME=PATH.")
    return {name: path}


def _check(given: options.LoadOptions) -> GivenMap | None:
    """The device map, read. Raises UsageError for what can be known to be wrong before anything is
    downloaded.
    """
    device_map = None if given.device_map is None else _read_device_map(given.device_map)
    on_cpu = (given.device, device_map) == ("cpu", None)
    if given.device != "cpu" and device_map is not None:
        raise UsageError("Got both --device and --device-map; give one.")
    dtypes = [name for name in options.DTYPES if not (on_cpu and name == "float16")]
    options.check_name("--dtype", given.dtype, dtypes)
    options.check_name("--compute", given.compute, options.COMPUTE)
    options.check_name("--kv-dtype", given.kv_dtype, options.KV_DTYPES)
    options.check_name("--speculation", given.speculation, options.SPECULATIONS)
    options.check_name("--rope", given.rope, ROPE_MODES)
    if (given.weights, given.group_size, given.head_weights) != ("auto", None, None):
        from qwenkit.formats.plan import WeightPlan  # imports torch

        with options_named():
            WeightPlan(given.weights, given.group_size, given.head_weights)
    if not on_cpu:
        from qwenkit.parallel import read_places  # imports torch

        with options_named():
            read_places(given.device if device_map is None else device_map)
    return device_map


def _read_device_map(text: str) -> str | dict[str, str | int]:
    """The value of --device-map: "auto", or a JSON object of module paths and devices.

    Raises UsageError for anything else.
    """
    if text == "auto":
        return text
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(v, str | int) for v in given.values()):
        raise UsageError(
            f"--device-map: got {text!r}; expected auto, or a JSON object such as "
            """'{"": "cuda:0", "lm_head": "cpu"}'. For one device use --device."""
        )
    return given


@contextmanager
def options_named() -> Iterator[None]:
    """Errors that begin with the name of a setting begin with that of its option instead."""
    try:
        yield
    except UsageError as error:
        setting, _, message = str(error).partition(":")
        if setting not in _OPTIONS:
            raise
        raise UsageError(f"{_OPTIONS[setting]}:{message}") from error
