"""An OpenAI-compatible server as the page sees it: its models, and replies that stream in.

Only this file talks to it, by the `openai` package.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urlsplit

from qwenkit.errors import MissingDependencyError, UsageError
from qwenkit.web.reply import CallPiece, Piece, Usage
from qwenkit.web.words import word

_CONNECT_S = 10.0
_REASON_CHARACTERS = 2000


class ChatServer:
    """An OpenAI-compatible server under `url`, the address that ends in /v1."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingDependencyError("openai", "web", "The chat page") from error
        self.url = checked_url(url)
        self._openai = openai
        # Without a bound on reading: a long prompt on a slow machine takes minutes, and there is a
        # stop button. A proxy has no business between a page and a server on the same machine.
        timeout = openai.Timeout(None, connect=_CONNECT_S)
        http = openai.DefaultAsyncHttpxClient(
            timeout=timeout, trust_env=not is_on_this_machine(self.url), follow_redirects=False
        )
        self._client = openai.AsyncOpenAI(
            base_url=self.url, api_key=api_key or "none", http_client=http, max_retries=0
        )

    async def models(self) -> tuple[str, ...]:
        """The names of its models. Raises what `explain` explains."""
        page = await self._client.with_options(timeout=_CONNECT_S).models.list()
        return tuple(model.id for model in page.data)

    async def stream(self, request: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """The pieces of a reply as they come. Closing the iterator hangs up, which lets the server
        stop. Raises what `explain` explains.
        """
        try:
            stream = await self._client.chat.completions.create(**request)
        except self._openai.BadRequestError as error:
            if "stream_options" not in str(error):
                raise
            fewer = {name: value for name, value in request.items() if name != "stream_options"}
            stream = await self._client.chat.completions.create(**fewer)
        async with stream:
            async for chunk in stream:
                yield piece_of(chunk)

    def explain(self, error: Exception, language: str) -> str:
        """What an exception of this server means, for people."""
        if isinstance(error, self._openai.APIStatusError):
            said = error.body.get("message") if isinstance(error.body, dict) else None
            reason = str(said or error)[:_REASON_CHARACTERS]
            return word("refused", language, status=error.status_code, reason=reason)
        if isinstance(error, self._openai.APIConnectionError):
            return word("no_server", language, url=self.url)
        return word("broken", language, reason=f"{error or type(error).__name__}")


def piece_of(chunk: Any) -> Piece:
    """What one chunk of `chat.completions` adds; fields that a server leaves out are empty."""
    usage = getattr(chunk, "usage", None)
    counts = None
    if usage is not None:
        details = getattr(usage, "prompt_tokens_details", None)
        counts = Usage(
            usage.prompt_tokens, usage.completion_tokens, getattr(details, "cached_tokens", None)
        )
    model = getattr(chunk, "model", None) or ""
    choice = next(iter(chunk.choices or ()), None)
    if choice is None or choice.delta is None:
        return Piece(usage=counts, model=model)
    delta = choice.delta
    return Piece(
        text=delta.content or "",
        reasoning=getattr(delta, "reasoning_content", None) or "",
        calls=tuple(_call_piece(call) for call in delta.tool_calls or ()),
        finish=choice.finish_reason,
        usage=counts,
        model=model,
    )


def _call_piece(call: Any) -> CallPiece:
    function = call.function
    name = None if function is None else function.name
    arguments = None if function is None else function.arguments
    return CallPiece(call.index or 0, id=call.id, name=name, arguments=arguments)


def checked_url(url: str) -> str:
    """`url` without a slash at its end. Raises UsageError unless it is one of http or https."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment:
        raise UsageError(
            f"{url!r} is no address of a server. Write it like http://127.0.0.1:8000/v1."
        )
    return url.rstrip("/")


def is_on_this_machine(url: str) -> bool:
    """The address is a loopback one."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
