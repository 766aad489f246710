"""`qwenkit serve`: the model behind the OpenAI API, and Ollama's."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenkit.cli import beside, console, loading, options
from qwenkit.cli.grouped import grouped
from qwenkit.cli.serving import (
    Adapters,
    KvCacheTokens,
    ServedNames,
    check_installed,
    check_names,
    public_name,
    read_adapters,
)
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from socket import socket

    from qwenkit.api import AsyncLLM
    from qwenkit.server.settings import Access, ServerSettings

HOST, PORT = "127.0.0.1", 8000

CheckpointPath = Annotated[
    str | None,
    typer.Option("-c", "--checkpoint-path", metavar="MODEL", help="Another way to give the model."),
]
CpuOnly = Annotated[
    bool, typer.Option("--cpu-only", help="Compute on the CPU, as without --device.")
]
DisableGc = Annotated[
    bool,
    typer.Option(
        "--disable-gc",
        help="Taken for the sake of old scripts: nothing is collected after a reply anyhow.",
    ),
]
Ui = Annotated[bool, typer.Option("--ui", help="Start `qwenkit web` beside, a page to chat with.")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DoorOptions:
    """Where the server listens and who may ask."""

    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDRESS", help=f"Address to listen on. [default: {HOST}]"),
    ] = None
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="N",
            min=0,
            max=65535,
            help=f"Port to listen on; 0 takes a free one. [default: {PORT}]",
        ),
    ] = None
    server_name: Annotated[
        str | None, typer.Option("--server-name", metavar="ADDRESS", help="As --host.")
    ] = None
    server_port: Annotated[
        int | None,
        typer.Option("--server-port", metavar="N", min=0, max=65535, help="As --port."),
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A key that requests must show as Bearer token; may be given several times. Other "
            f"programs can see it here: {beside.KEY_VARIABLE} or --api-key-file keep it from them.",
        ),
    ] = None
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys, one a line.")] = (
        None
    )
    api_auth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER:PASS", help="A name and password for HTTP Basic; several times for more."
        ),
    ] = None
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody ask, from other machines too.")
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that the server may be addressed by, beside IP addresses, localhost and "
            "this machine's name; * for any.",
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages that may ask through a browser, such as https://chat.example.com; * "
            "for all.",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """What one server takes on; the defaults are `ServerSettings`'s."""

    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers that are computed or wait at a time.")
    ] = 512
    max_choices: Annotated[
        int, typer.Option(metavar="N", min=1, max=128, help="Largest n of a request.")
    ] = 128
    max_prompts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most prompts of one completion request.")
    ] = 128
    max_body_mib: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest body of a request in MiB.")
    ] = 4
    allow_priority: Annotated[
        bool,
        typer.Option(
            "--allow-priority",
            help="Let requests go before those of other keys; with one key they may anyhow.",
        ),
    ] = False
    drain_seconds: Annotated[
        int,
        typer.Option(metavar="S", min=1, help="Time that running answers have when it is ended."),
    ] = 30
    step_seconds: Annotated[
        int,
        typer.Option(
            metavar="S",
            min=1,
            help="Time for one step of the engine; one that takes longer turns /health to 503.",
        ),
    ] = 600
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts and answers to the log too.")
    ] = False


@grouped
def command(
    model: options.ModelName = None,
    checkpoint_path: CheckpointPath = None,
    adapter: Adapters = None,
    served_model_name: ServedNames = None,
    ui: Ui = False,
    cpu_only: CpuOnly = False,
    disable_gc: DisableGc = False,
    kv_cache_tokens: KvCacheTokens = None,
    *,
    door: DoorOptions,
    limits: LimitOptions,
    loaded_as: options.LoadOptions,
) -> None:
    """Answer over HTTP, for the clients of OpenAI and of Ollama, many at a time.

    Without MODEL the embedded SmolLM2-135M-Instruct answers. It listens on this machine only and
    then needs no key; beyond it a key is needed. One line of JSON for each request goes to standard
    error. SIGTERM or Ctrl-C lets running answers end.

    \b
    Examples:
      qwenkit serve
      qwenkit serve Qwen/Qwen2-0.5B-Instruct --weights int4 --port 8080
      qwenkit serve --host 0.0.0.0 --api-key-file keys.txt
      qwenkit serve Qwen/Qwen2-7B-Instruct --adapter law=./law-lora
    """
    if cpu_only and (loaded_as.device, loaded_as.device_map) != ("cpu", None):
        raise UsageError("Got --cpu-only and another device; drop one.")
    name = options.one_of({"MODEL": model, "--checkpoint-path": checkpoint_path})
    name = options.check_model_name(name)
    host = options.one_of({"--host": door.host, "--server-name": door.server_name}) or HOST
    port = _port(door)
    adapters = read_adapters(adapter)
    check_installed("qwenkit serve")
    from qwenkit.server.door import bind, check_access

    access = _access(door)
    check_access(host, access, no_auth=door.no_auth)
    if ui:
        beside.check_page()
        access = _with_page_key(access)
    with bind(host, port) as listening:  # a port in use is known before the model is loaded
        llm = loading.load_served_model(name, loaded_as, adapters, kv_cache_tokens)
        settings = _settings(
            name, llm.record.name, llm.record.model_type, served_model_name, access, limits
        )
        check_names(adapters, settings.names)
        _run(llm, settings, listening, page_key=_page_key(access) if ui else None, host=host)


def _run(
    llm: AsyncLLM, settings: ServerSettings, listening: socket, *, page_key: str | None, host: str
) -> None:
    """Serve until the end; with a `page_key` (empty: none is needed) the chat page beside it."""
    from qwenkit.server import run

    port = listening.getsockname()[1]
    address = _url((listening.getsockname()[0], port))
    _log_lines()
    with ExitStack() as stack:
        stack.callback(llm.close_now)

        def ready() -> None:
            console.note(f"{settings.names[0]} answers at {address}/v1 ({address}/docs says how).")
            if page_key is not None:
                here = _url((_reachable(host), port))
                page = beside.start_page(f"{here}/v1", api_key=page_key or None)
                stack.enter_context(beside.ending(page))

        run.serve(llm, settings, listening, ready=ready)


def _port(door: DoorOptions) -> int:
    given = {"--port": door.port, "--server-port": door.server_port}
    texts = {option: None if value is None else str(value) for option, value in given.items()}
    asked = options.one_of(texts)
    return PORT if asked is None else int(asked)


def _access(door: DoorOptions) -> Access:
    from qwenkit.server.settings import Access

    keys = [*(door.api_key or ())]
    if os.environ.get(beside.KEY_VARIABLE):
        keys.append(os.environ[beside.KEY_VARIABLE])
    if door.api_key_file is not None:
        lines = options.read_text_file("--api-key-file", door.api_key_file).splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"--api-key-file {str(door.api_key_file)!r} has no key in it.")
        keys += found
    users = []
    for given in door.api_auth or ():
        user, colon, password = given.partition(":")
        if not colon or not user or not password:
            raise UsageError("--api-auth: expected USER:PASS, with something on both sides.")
        users.append((user, password))
    for key in keys:
        options.check_text("--api-key", key)
        if not key.strip() or not key.isprintable():
            raise UsageError("--api-key: a key is a text without line breaks that is not empty.")
    if door.no_auth and (keys or users):
        raise UsageError("Got --no-auth and a key; drop one.")
    return Access(
        api_keys=tuple(dict.fromkeys(keys)),
        users=tuple(dict.fromkeys(users)),
        hosts=tuple(door.allowed_host or ()),
        origins=tuple(door.allow_origin or ()),
    )


def _with_page_key(access: Access) -> Access:
    """The page beside the server asks with a key of its own, where a key is needed."""
    if access.is_open:
        return access
    return dataclasses.replace(access, api_keys=(*access.api_keys, secrets.token_urlsafe(24)))


def _page_key(access: Access) -> str:
    return access.api_keys[-1] if access.api_keys else ""


def _reachable(host: str) -> str:
    """The address at which this machine itself reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _settings(
    given: str,
    own_name: str,
    model_type: str,
    served_names: list[str] | None,
    access: Access,
    limits: LimitOptions,
) -> ServerSettings:
    from qwenkit.server.settings import MIB, ServerSettings

    names = tuple(dict.fromkeys(served_names or [public_name(given, own_name)]))
    parties = len(access.api_keys) + len(access.users)
    return ServerSettings(
        names=names,
        aliases=_aliases(model_type),
        access=access,
        allow_priority=limits.allow_priority or parties <= 1,
        log_prompts=limits.log_prompts,
        max_body_bytes=limits.max_body_mib * MIB,
        max_requests=limits.max_requests,
        max_choices=limits.max_choices,
        max_prompts=limits.max_prompts,
        drain_s=float(limits.drain_seconds),
        step_s=float(limits.step_seconds),
    )


def _aliases(model_type: str) -> tuple[str, ...]:
    """ "Qwen" is what the programs of the first generation call whatever Qwen is served."""
    return ("Qwen",) if model_type.startswith("qwen") else ()


def _url(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_lines() -> None:
    """What is logged is lines of JSON on standard error, one for each request."""
    from qwenkit.server.guard import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("qwenkit", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("qwenkit.server").setLevel(logging.INFO)
