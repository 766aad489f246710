"""`qwenkit web`: a page to chat on, in a process of its own."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from contextlib import ExitStack
from typing import Annotated

import typer

from qwenkit.cli import beside, console, options
from qwenkit.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
PORT, PORT_WITH_MODEL = 7860, 8000  # the second is the first generation's web_demo.py
_PORTS_TRIED = 20

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help=f"Any OpenAI-compatible server, up to /v1. [default: {DEFAULT_URL}]"
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", envvar=beside.KEY_VARIABLE, help="The server's key.", show_default=False
    ),
]
CheckpointPath = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--checkpoint-path",
        metavar="MODEL",
        help="Start `qwenkit serve` for this model beside the page, and end it with the page.",
    ),
]
CpuOnly = Annotated[
    bool, typer.Option("--cpu-only", help="With -c: compute on the CPU, as it does anyhow.")
]
Share = Annotated[
    bool,
    typer.Option(
        "--share",
        help="Open a public address through Gradio's service, which sees all that is said. "
        "Needs --auth.",
    ),
]
InBrowser = Annotated[bool, typer.Option("--inbrowser", help="Open the page in your browser.")]
ServerPort = Annotated[
    int | None,
    typer.Option(
        "--server-port",
        "--port",
        metavar="N",
        min=0,
        max=65535,
        help=f"Where the page is; 0 takes a free port. [default: {PORT}, or {PORT_WITH_MODEL} "
        "with -c; the next free one]",
    ),
]
ServerName = Annotated[
    str, typer.Option("--server-name", "--host", metavar="ADDRESS", help="Address to listen on.")
]
Auth = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:PASSWORD",
        envvar="QWENKIT_WEB_AUTH",
        help="Who may open the page; may be given several times.",
        show_default=False,
    ),
]
NoAuth = Annotated[
    bool, typer.Option("--no-auth", help="Let everybody who reaches this address in.")
]
System = Annotated[
    str, typer.Option(metavar="TEXT", help="System prompt of a browser that has chosen none yet.")
]


def command(
    url: Url = None,
    api_key: ApiKey = None,
    checkpoint_path: CheckpointPath = None,
    cpu_only: CpuOnly = False,
    share: Share = False,
    inbrowser: InBrowser = False,
    server_port: ServerPort = None,
    server_name: ServerName = "127.0.0.1",
    auth: Auth = None,
    no_auth: NoAuth = False,
    system: System = "",
) -> None:
    """Open a chat page for a server: `qwenkit serve` or any other that speaks OpenAI's API.

    The page listens on this machine only, keeps conversations in the browser, and loads nothing
    from outside. Ctrl-C ends it.

    \b
    Examples:
      qwenkit web
      qwenkit web --url http://127.0.0.1:11434/v1 --inbrowser
      qwenkit web -c Qwen/Qwen2-0.5B-Instruct
      qwenkit web --server-name 0.0.0.0 --auth me:a-long-password
    """
    users = _users(auth)
    _check_open(server_name, share, bool(users), no_auth)
    beside.check_page()
    if checkpoint_path is None:
        if cpu_only:
            raise UsageError(
                "--cpu-only is for the model of -c; the server at --url decides itself."
            )
        address, key = url or DEFAULT_URL, api_key
    elif url is not None:
        raise UsageError("Got both --url and -c; give one: a server, or a model to serve.")
    else:
        options.check_model_name(checkpoint_path)
        port = beside.free_port()
        address, key = f"http://127.0.0.1:{port}/v1", secrets.token_urlsafe(24)
    from qwenkit.web.client import ChatServer

    server = ChatServer(address, key)
    listening = _bind(server_name, server_port, PORT_WITH_MODEL if checkpoint_path else PORT)
    with ExitStack() as stack:
        stack.enter_context(listening)
        if checkpoint_path is not None:
            assert key is not None
            child = beside.start_server(checkpoint_path, api_key=key, port=port, cpu_only=cpu_only)
            stack.enter_context(beside.ending(child))
            beside.wait_until_ready(child, address, api_key=key)
        _open_page(server, listening, users, system, share=share, inbrowser=inbrowser)


def _open_page(
    server: object,
    listening: socket.socket,
    users: dict[str, str],
    system: str,
    *,
    share: bool,
    inbrowser: bool,
) -> None:
    from qwenkit.web import serving
    from qwenkit.web.client import ChatServer
    from qwenkit.web.guard import Admission

    assert isinstance(server, ChatServer)
    host, port = listening.getsockname()[:2]
    hosts = None
    if serving.is_loopback(host):
        hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]", str(host)}
    app = serving.page_app(server, Admission(hosts=hosts, users=users), system=system)
    here = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    listening.listen()  # whoever comes at once has to wait a moment, and is not turned away
    console.note(f"The chat page is at {here}/ and talks to {server.url}.")
    if share:
        console.note("--share: Gradio's service carries, and can read, all that is said.")
        public = serving.share(host, port)
        if hosts is not None:
            hosts.add(public.partition("://")[2].strip("/"))
        console.note(f"Everybody with the password reaches it at {public}.")
    if inbrowser:
        webbrowser.open(here)
    serving.run(app, listening)


def _users(given: list[str] | None) -> dict[str, str]:
    users = {}
    for item in given or ():
        name, colon, password = item.partition(":")
        if not colon or not name or not password:
            raise UsageError("--auth: write NAME:PASSWORD, neither of them empty.")
        users[options.check_text("--auth", name)] = options.check_text("--auth", password)
    return users


def _check_open(host: str, share: bool, has_users: bool, no_auth: bool) -> None:
    """Raises UsageError where strangers could come in without anybody having said so."""
    from qwenkit.web.serving import is_loopback

    if has_users and no_auth:
        raise UsageError("Got both --auth and --no-auth; drop one.")
    if share and not has_users:
        raise UsageError(
            "--share puts the page, and with it the model, before the whole internet. "
            "Give --auth NAME:PASSWORD too."
        )
    if not is_loopback(host) and not (has_users or no_auth):
        raise UsageError(
            f"--server-name {host} lets other machines in. Give --auth NAME:PASSWORD, or --no-auth "
            "if everybody who reaches this address may chat."
        )


def _bind(host: str, port: int | None, first: int) -> socket.socket:
    """A bound socket. Raises UsageError when a port that was asked for cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in [port] if port is not None else range(first, first + _PORTS_TRIED):
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host.strip("[]"), wanted))
        except OSError as error:
            listening.close()
            reason = error.strerror
            continue
        return listening
    named = f"port {port}" if port is not None else f"ports {first} to {first + _PORTS_TRIED - 1}"
    raise UsageError(f"The page cannot listen on {host}, {named}: {reason}. Try --server-port 0.")
