"""What the rows are given: a server on the board's model, sizes, a seed, and places for files."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qwenkit.bench.http_client import Target
from qwenkit.bench.reliability.model import BoardModel, board_model
from qwenkit.bench.reliability.spec import Size, Tally
from qwenkit.bench.server_process import ServerProcess
from qwenkit.errors import UsageError

KEY, OTHER_KEY = "board-key-of-everybody", "board-key-of-somebody-else"
_ROOM_TOKENS = 65_536  # of the server that rows share: nobody has to make room
_ROWS_APART = 1000  # seeds of one row, beside those of the next
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSettings:
    """How a run is made. `cache` is where model, environments and failing inputs are kept; `target`
    somebody else's server, in place of our own; `checkout` the folder of a source checkout, whose
    tests are rows too; `make_tools` lets environments be made that a row needs.
    """

    cache: Path
    size: Size = "quick"
    seed: int = 0
    target: Target | None = None
    model_name: str | None = None
    checkout: Path | None = None
    make_tools: bool = False
    threads: int = 2

    @property
    def failures(self) -> Path:
        """The folder of inputs that once broke a promise."""
        return self.cache / "bench" / "failures"


@dataclass(slots=True)
class Board:
    """One run. Servers end with it; `say` is called with what is being done."""

    settings: BoardSettings
    say: Callable[[str], None] = lambda what: None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _shared: ServerProcess | None = None
    _watched: dict[ServerProcess, int] = field(default_factory=dict)  # resident at the beginning

    async def __aenter__(self) -> Board:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    def pick(self, quick: T, full: T) -> T:
        """One of two sizes."""
        return quick if self.settings.size == "quick" else full

    def random(self, row: int, turn: int = 0) -> random.Random:
        """A generator of the run's seed, for each row and turn another."""
        return random.Random((self.settings.seed * _ROWS_APART + row) * _ROWS_APART + turn)

    @property
    def model(self) -> Path:
        """The folder of the board's model, made at the first call."""
        return self.make_model(BoardModel())

    def make_model(self, model: BoardModel) -> Path:
        """The folder of another one like it."""
        return board_model(self.settings.cache / "bench", model)

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.settings.model_name or "default"

    async def server(self) -> ServerProcess:
        """The server that rows share, started anew if it has died.

        Raises UsageError where the target is somebody else's, QwenkitError when it does not start.
        """
        if self.settings.target is not None:
            raise UsageError("url: this row needs a server of its own.")
        if self._shared is None or not self._shared.is_alive:
            self.say("starting a server")
            options = ("--api-key", OTHER_KEY, "--kv-cache-tokens", str(_ROOM_TOKENS))
            started = self.new_server(*options)
            self._shared = await self._stack.enter_async_context(started)
        return self._shared

    async def target(self) -> Target:
        """Whom to ask: somebody else's server, or the shared one."""
        return self.settings.target or (await self.server()).target

    @asynccontextmanager
    async def new_server(
        self, *options: str, key: str | None = KEY, model: Path | None = None
    ) -> AsyncIterator[ServerProcess]:
        """A server for the caller alone, ready, its memory watched until the block ends."""
        own = ("--threads", str(self.settings.threads), *options)
        with ServerProcess.ours(model or self.model, *own, key=key) as server:
            await server.wait_until_ready()
            self.watch(server)
            try:
                yield server
            finally:
                self._watched.pop(server, None)

    def watch(self, server: ServerProcess) -> None:
        """Count its memory from here on."""
        server.forget_peak()
        self._watched[server] = server.resident_bytes()

    def begin(self) -> None:
        """Start the memory of all servers anew, for a row."""
        for server in [server for server in self._watched if server.is_alive]:
            self.watch(server)

    def measure(self, tally: Tally) -> None:
        """Note the most that a server took beyond what it had when it was watched."""
        for server, before in self._watched.items():
            if server.is_alive:
                tally.used(max(0, server.peak_bytes() - before))
