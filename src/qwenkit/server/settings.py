"""What a server allows, and under which names it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenkit.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20
_WHOLE = (
    "max_body_bytes",
    "max_header_bytes",
    "max_requests",
    "max_choices",
    "max_prompts",
    "max_connections",
)
_SECONDS = (
    "header_timeout_s",
    "body_timeout_s",
    "idle_timeout_s",
    "keep_alive_s",
    "drain_s",
    "step_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask, and from where.

    `api_keys` are taken as Bearer tokens, `users` as (name, password) of Basic authentication; with
    neither everybody may ask. `hosts` are names beside IP addresses, localhost and the machine's
    own name under which the server may be addressed ("*": any), `origins` the web pages that may
    ask through a browser ("*": any).
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    users: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """True when no key is asked for."""
        return not self.api_keys and not self.users


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server. Of `names` the first is the one that answers bear; the others, the adapters'
    names and "default" are taken too; `aliases` are taken but not listed.

    `max_requests` bounds the answers that are computed or wait at one time (each choice and each
    prompt counts), `max_choices` the `n` and `max_prompts` the prompts of one request. A header has
    to come within `header_timeout_s`, a body within `body_timeout_s`; a connection may be idle for
    `idle_timeout_s`. A stream that is silent for `keep_alive_s` gets a comment. On the way down
    requests have `drain_s` to end. An engine longer than `step_s` at one step is stuck until that
    step ends. With `log_prompts` the log has the texts too.

    Raises UsageError naming the setting on construction.
    """

    names: tuple[str, ...] = ("default",)
    aliases: tuple[str, ...] = ()
    access: Access = field(default_factory=Access)
    allow_priority: bool = True
    log_prompts: bool = False
    max_body_bytes: int = 4 * MIB
    max_header_bytes: int = 32 * KIB
    max_requests: int = 512
    max_choices: int = 128
    max_prompts: int = 128
    max_connections: int = 1000
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 60.0
    keep_alive_s: float = 15.0
    drain_s: float = 30.0
    step_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise UsageError(f"names: got {self.names!r}; a served model needs a name.")
        for name in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        for name in _SECONDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"{name}: expected seconds above 0, got {value!r}.")
