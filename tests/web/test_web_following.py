"""A reply that streams in: shown now and then, stopped at once, its errors its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from qwenkit.web.conversation import Turn
from qwenkit.web.following import Run, follow
from qwenkit.web.reply import Piece, Reply


class Source:
    """Pieces with pauses; `closed` says that the reader has hung up."""

    def __init__(self, *pieces: str | float | Exception) -> None:
        self._pieces = pieces
        self.closed = False

    async def stream(self) -> AsyncGenerator[Piece, None]:
        try:
            for piece in self._pieces:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, str):
                    yield Piece(text=piece)
                else:
                    await asyncio.sleep(piece)
            yield Piece(finish="stop")
        finally:
            self.closed = True


def run(
    source: Source, *, stop_after: int | None = None, leave_after: int | None = None
) -> tuple[Turn, int]:
    """(the turn it became, how often it was shown)."""

    async def main() -> tuple[Turn, int]:
        reply, state, shown = Reply(model="m", started_s=0.0), Run(pause_s=0.01), 0
        updates = follow(source.stream(), reply, state, explain=lambda e: f"broken: {e}")
        async for _ in updates:
            shown += 1
            if shown == stop_after:
                state.stop.set()
            if shown == leave_after:
                await updates.aclose()  # type: ignore[attr-defined]  # an async generator
                break
        assert source.closed
        return reply.turn(), shown

    return asyncio.run(main())


def test_all_of_it_comes() -> None:
    turn, shown = run(Source("a", 0.03, "b", 0.03, "c"))
    assert (turn.text, turn.ended) == ("abc", "stop")
    assert 2 <= shown <= 3


def test_a_sign_of_life_comes_without_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenkit.web.following.LATEST_S", 0.05)
    assert run(Source(0.2))[1] >= 2


def test_pieces_that_come_fast_are_shown_together() -> None:
    turn, shown = run(Source(*"x" * 5000))
    assert len(turn.text) == 5000
    assert shown <= 20


def test_stopping_keeps_what_was_said_and_hangs_up() -> None:
    turn, _ = run(Source("so ", 0.03, "far", 60.0, "never"), stop_after=1)
    assert (turn.text, turn.ended) == ("so ", "stopped")


def test_a_reader_who_leaves_hangs_up() -> None:
    turn, _ = run(Source("a", 60.0), leave_after=1)
    assert turn.text == "a"


def test_an_error_is_the_replys() -> None:
    turn, _ = run(Source("a", ValueError("bad")))
    assert (turn.text, turn.ended, turn.error) == ("a", "error", "broken: bad")


def test_ending_waits_until_it_is_kept() -> None:
    async def main() -> None:
        state = Run()
        ending = asyncio.create_task(state.end())
        await asyncio.sleep(0)
        assert state.stop.is_set()
        assert not ending.done()
        state.done.set()
        await ending

    asyncio.run(main())
