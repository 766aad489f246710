"""The loop of the board: a row after another, its line, and files of what went wrong."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence

from qwenkit.bench.reliability.board import Board, BoardSettings
from qwenkit.bench.reliability.failures import keep_failure
from qwenkit.bench.reliability.spec import Result, Row, Tally

Say = Callable[[str], None]


async def run_rows(
    rows: Sequence[Row], settings: BoardSettings, *, say: Say = lambda what: None
) -> AsyncIterator[Result]:
    """Each row's result as soon as it is there. A row that raises fails with what it raised.

    What did not keep a promise is written to `settings.failures`.
    """
    async with Board(settings, say) as board:
        for row in rows:
            say(f"row {row.id}, {row.name}")
            yield await run_row(row, board)


async def run_row(row: Row, board: Board) -> Result:
    """One row; see `run_rows`."""
    tally, start_s = Tally(), time.perf_counter()
    if row.needs_own_server and board.settings.target is not None:
        tally.unavailable = "needs a server of its own"
    else:
        board.begin()
        try:
            await row.run(board, tally)
        except Exception as error:  # a row that breaks down holds nothing, and the others go on
            tally.check("the row itself", False, f"{type(error).__name__}: {error}")
        board.measure(tally)
    seconds = time.perf_counter() - start_s
    settings = board.settings
    result = Result(row=row, size=settings.size, seed=settings.seed, seconds=seconds, tally=tally)
    for failure in tally.failures:
        keep_failure(settings.failures, row.id, settings.seed, failure)
    return result
