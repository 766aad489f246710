"""Row 10: requests made of the published schema, and against it, by schemathesis."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwenkit.bench.environments import python_for
from qwenkit.bench.http_client import Target
from qwenkit.bench.process import run_program
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.failures import kept_failures
from qwenkit.bench.reliability.model import BoardModel
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import Wire
from qwenkit.errors import QwenkitError

_TOOL = "schemathesis"
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
_SHORT = BoardModel(context_tokens=256, answer_tokens=4)  # many requests ask for all there is
_ROOM = 32_768  # tokens
_KEPT_OF_A_KIND = 3
_WITHIN_S = 7200.0


async def run(board: Board, tally: Tally) -> None:
    """Fuzz every operation, then look whether the server is as it was."""
    try:
        python = python_for(
            _TOOL,
            board.settings.cache / "peers",
            make=board.settings.make_tools,
            progress=board.say,
        )
    except QwenkitError as error:
        tally.unavailable = str(error)
        return
    if board.settings.target is not None:
        await _fuzz(board, board.settings.target, python, tally)
        return
    short = board.make_model(_SHORT)
    async with board.new_server("--kv-cache-tokens", str(_ROOM), model=short) as server:
        await _fuzz(board, server.target, python, tally)
        tally.check("the server lives", server.is_alive, server.last_words())
        board.measure(tally)


async def _fuzz(board: Board, target: Target, python: str, tally: Tally) -> None:
    victims = Victims(target, board.served_name, count=2, tokens=24)
    await victims.record()
    await _again(board, target, tally)
    board.say("row 10, fuzzing")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ndjson"
        command = _command(python, target, report, board.pick(300, 2000), board.settings.seed)
        cwd = Path(folder)
        text = await asyncio.to_thread(run_program, command, cwd=cwd, timeout_s=_WITHIN_S)
        if not report.exists():
            raise QwenkitError(f"{_TOOL}: {text[-500:]}")
        read_report(report, tally)
    tally.check("operations were fuzzed", tally.figures.get("operations", 0) > 0, text[-500:])
    await victims.check_all(tally, "the fuzz")


def _command(python: str, target: Target, report: Path, examples: int, seed: int) -> list[str]:
    options = {
        "--mode": "all",
        "--phases": "examples,coverage,fuzzing",
        "--checks": ",".join(_CHECKS),
        "--max-examples": str(examples),
        "--seed": str(seed),
        "--generation-allow-x00": "true",
        "--generation-database": "none",
        "--suppress-health-check": "all",
        "--request-timeout": "60",
        "--workers": "2",
        "--report": "ndjson",
        "--report-ndjson-path": str(report),
        "--output-sanitize": "false",
    }
    flags = [word for pair in options.items() for word in pair]
    if target.key is not None:
        flags += ["--header", f"Authorization: Bearer {target.key}"]
    url = f"{target.url}/openapi.json"
    own = [python, "-m", "schemathesis.cli", "run", url, "--no-color", "--no-shrink"]
    return [*own, "--continue-on-failure", *flags]


async def _again(board: Board, target: Target, tally: Tally) -> None:
    """What once failed."""
    for name, given in kept_failures(board.settings.failures, 10):
        if "path" in given:
            answer = await Wire.from_json(given).send(target)
            fits = answer.status not in (0, *range(500, 600))
            tally.check(name, fits, answer.shown, given)


def read_report(report: Path, tally: Tally) -> None:
    """Count the cases of schemathesis's report: a line of JSON for each event."""
    kinds: Counter[tuple[str, str]] = Counter()
    operations = set()
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            if "FatalError" in event:
                tally.check(_TOOL, False, event["FatalError"])
            scenario = event.get("ScenarioFinished")
            if scenario is None:
                continue
            recorder = scenario["recorder"]
            operations.add(recorder["label"])
            for case, faults, interaction in _cases(recorder):
                _count(recorder["label"], case, faults, interaction, kinds, tally)
    tally.figures["operations"] = len(operations)


def _cases(recorder: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Each case that was sent, the checks that it failed, and what was sent and answered."""
    for case, interaction in recorder.get("interactions", {}).items():
        checks = recorder.get("checks", {}).get(case, ())
        faults = [check for check in checks if check["status"] == "failure"]
        yield case, faults, interaction


def _count(
    label: str,
    case: str,
    faults: list[dict[str, Any]],
    interaction: dict[str, Any],
    kinds: Counter[tuple[str, str]],
    tally: Tally,
) -> None:
    response = interaction.get("response")
    status = response["status_code"] if response else 0
    tally.count(f"{status // 100}xx" if status else "no answer")
    tally.took(float(response["elapsed"]) if response else 0.0)
    if not faults and status:
        tally.check(case, True)
        return
    name = ", ".join(fault["name"] for fault in faults) or "no answer"
    kinds[label, name] += 1
    given = _wire(interaction["request"]) if kinds[label, name] <= _KEPT_OF_A_KIND else None
    detail = [fault.get("failure_info", {}).get("failure", {}) for fault in faults]
    words = [f"{found.get('title')}: {found.get('message')}" for found in detail]
    tally.check(f"{label}: {name}", False, "; ".join(words) or status, given)


def _wire(request: dict[str, Any]) -> dict[str, Any]:
    """A request of the report as a `Wire` has it; without the key, which is each run's own."""
    parts = urlsplit(request["uri"])
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    headers = [
        [name, value]
        for name, values in request["headers"].items()
        for value in values
        if name.lower() not in ("authorization", "content-length", "host")
    ]
    data: dict[str, Any] = {"method": request["method"], "path": path, "headers": headers}
    body = (request.get("body") or {}).get("$base64")
    if body is None:
        return data
    try:
        return data | {"body": base64.b64decode(body).decode()}
    except UnicodeDecodeError:
        return data | {"body_base64": body}


ROW = Row(
    id=10,
    promise="nothing made of the schema, or against it, is answered with a 5xx or out of schema",
    run=run,
    needs_own_server=False,
)
