"""Runs the page: Gradio behind the guard, on a socket that is already bound."""

from __future__ import annotations

import ipaddress
from typing import Any

from qwenkit.errors import MissingDependencyError, QwenkitError
from qwenkit.web.client import ChatServer
from qwenkit.web.guard import Admission, Guard

_PAGES_AND_ANSWERS = 1000  # at once: each open page is an event that is never done, see `linger`
_LEAVE_S = 2  # seconds that open streams have to end when the page is stopped
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "monospace"]


def page_app(server: ChatServer, admission: Admission, *, system: str = "") -> Any:
    """The page as an ASGI application. Raises MissingDependencyError where Gradio is not there."""
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "fastapi"):
            raise
        raise MissingDependencyError("gradio", "web", "The chat page") from error
    from qwenkit.web.actions import Actions  # these import Gradio
    from qwenkit.web.layout import build

    page, parts = build()
    with page:
        Actions(parts, server, system=system).connect(page)
    page.max_threads = _PAGES_AND_ANSWERS
    page.queue(default_concurrency_limit=None, api_open=False)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        footer_links=[],
        run_history=False,  # Gradio would keep a second copy of all that is said
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        theme=gr.themes.Base(font=_FONTS, font_mono=_MONO_FONTS, primary_hue="violet"),
    )
    return Guard(app, admission)


def run(app: Any, listening: Any) -> None:
    """Answer on the bound socket `listening` until the process is told to end."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LEAVE_S,
    )
    uvicorn.Server(config).run(sockets=[listening])


def share(host: str, port: int) -> str:
    """Open Gradio's public tunnel to the page, and return its address.

    This reaches out to Gradio's own service, which then sees all traffic. Raises QwenkitError.
    """
    import secrets

    from gradio import networking

    try:
        return str(networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None))
    except (RuntimeError, OSError, ValueError) as error:
        raise QwenkitError(
            f"Gradio's tunnel could not be opened: {error} Leave out --share to stay here."
        ) from error


def is_loopback(host: str) -> bool:
    """`host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
