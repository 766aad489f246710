"""The frame of the board: rows are found, lines have their form, failures are kept and found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenkit.bench.http_client import Answer, Target
from qwenkit.bench.numbers import write_section
from qwenkit.bench.reliability.board import Board, BoardSettings
from qwenkit.bench.reliability.failures import keep_failure, kept_failures
from qwenkit.bench.reliability.hostile_constraints import CASES
from qwenkit.bench.reliability.hostile_requests import HOSTILE
from qwenkit.bench.reliability.report import BoardReport
from qwenkit.bench.reliability.rows.r10_schema_fuzz import read_report
from qwenkit.bench.reliability.rows.r18_doors import welch_t
from qwenkit.bench.reliability.rows.r20_soak import slope_of
from qwenkit.bench.reliability.runner import run_rows
from qwenkit.bench.reliability.spec import (
    NAMES,
    Failure,
    Result,
    Row,
    Tally,
    chosen_rows,
    find_rows,
    missing_rows,
)
from qwenkit.bench.reliability.tested import run_tests
from qwenkit.bench.reliability.wire import Wire, fault_of_answer
from qwenkit.cli.bench_reliability import HEADING
from qwenkit.cli.main import app
from qwenkit.errors import UsageError

ROWS = Path(__file__).parents[2] / "src" / "qwenkit" / "bench" / "reliability" / "rows"


def settings(folder: Path, **more: object) -> BoardSettings:
    return BoardSettings(cache=folder, **more)  # type: ignore[arg-type]


def row(run: object, number: int = 9, **more: object) -> Row:
    return Row(id=number, promise="it holds", run=run, **more)  # type: ignore[arg-type]


def results(rows: list[Row], given: BoardSettings) -> list[Result]:
    async def all_of_them() -> list[Result]:
        return [result async for result in run_rows(rows, given)]

    return asyncio.run(all_of_them())


def test_every_file_of_the_folder_is_a_row_and_the_rest_is_named() -> None:
    found = find_rows()
    numbers = {int(path.name[1:3]) for path in ROWS.glob("r*.py")}
    assert set(found) == numbers
    assert {9, 10, 12, 14, 15, 17, 18, 19, 22, 27} <= numbers
    assert set(found) | set(missing_rows()) == set(NAMES)
    assert all(len(each.promise.split()) > 4 for each in found.values())
    assert [each.id for each in chosen_rows([18, 9])] == [9, 18]


@pytest.mark.parametrize(("number", "words"), [(99, "no row 99"), (23, "not here yet")])
def test_an_unknown_row_is_named(number: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen_rows([number])


def test_a_line_has_number_name_score_time_and_memory(tmp_path: Path) -> None:
    async def run(board: Board, tally: Tally) -> None:
        tally.check("good", True)
        tally.check("bad", False, "it broke", {"path": "/x"})
        tally.took(1.234)
        tally.used(12_300_000)

    (result,) = results([row(run)], settings(tmp_path, seed=7))
    assert result.line().split("  ")[0] == " 9"
    assert result.line().split() == [
        *("9", "hostile", "requests", "1/2", "1.23", "s", "+12", "MB"),
    ]
    data = result.to_json()
    assert (data["passed"], data["total"], data["seed"], data["holds"]) == (1, 2, 7, False)
    (kept,) = (tmp_path / "bench" / "failures").iterdir()
    assert json.loads(kept.read_text()) == {
        "row": 9,
        "seed": 7,
        "case": "bad",
        "detail": "it broke",
        "given": {"path": "/x"},
    }


def test_a_row_that_breaks_down_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    async def broken(board: Board, tally: Tally) -> None:
        raise OSError("no network")

    async def fine(board: Board, tally: Tally) -> None:
        tally.check("good", True)

    first, second = results([row(broken), row(fine, 10)], settings(tmp_path))
    assert not first.holds
    assert "no network" in first.tally.failures[0].detail
    assert second.holds


def test_a_row_with_its_own_server_does_not_run_at_somebody_elses(tmp_path: Path) -> None:
    async def never(board: Board, tally: Tally) -> None:
        raise AssertionError

    given = settings(tmp_path, target=Target.parse("http://127.0.0.1:9"))
    (result,) = results([row(never)], given)
    assert result.line().split()[3:5] == ["not", "here"]
    assert result.tally.unavailable == "needs a server of its own"


def test_the_same_seed_gives_the_same_numbers_by_row_and_turn(tmp_path: Path) -> None:
    one, other = (Board(settings(tmp_path, seed=seed)) for seed in (3, 4))
    assert one.random(9).random() == Board(settings(tmp_path, seed=3)).random(9).random()
    values = {b.random(n, t).random() for b in (one, other) for n in (9, 10) for t in (0, 1)}
    assert len(values) == 8


def test_a_failure_is_kept_once_and_found_by_its_row_only(tmp_path: Path) -> None:
    failure = Failure("A case: of two", "d", Wire(content={"a": 1}).to_json())
    first = keep_failure(tmp_path, 9, 0, failure)
    again = keep_failure(tmp_path, 9, 5, Failure("again: A case", "d", failure.given))
    assert first == again
    assert first is not None
    assert first.name.startswith("row09-a-case-of-two-")
    (found,) = kept_failures(tmp_path, 9)
    assert Wire.from_json(found[1]).body() == b'{"a": 1}'
    assert kept_failures(tmp_path, 10) == []
    assert keep_failure(tmp_path, 9, 0, Failure("no input", "d")) is None
    (tmp_path / "row09-broken-0.json").write_text("{")
    assert len(kept_failures(tmp_path, 9)) == 1


@pytest.mark.parametrize("body", [b"\xff\xfe", b"", b"text", None])
def test_a_request_survives_being_kept(body: bytes | None) -> None:
    wire = Wire(path="/x", content=body, method="PUT", headers=(("A", "b"), ("A", "c")))
    data = json.loads(json.dumps(wire.to_json()))
    assert Wire.from_json(data) == wire


def answer(status: int, value: object) -> Answer:
    return Answer(status, {}, json.dumps(value).encode())


ERROR = {"message": "n: too many.", "type": "t", "param": "n", "code": None}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (answer(200, {"choices": []}), ""),
        (answer(400, {"error": ERROR}), ""),
        (Answer(200, {}, b"text"), "no JSON"),
        (answer(500, {"error": ERROR}), "500"),
        (Answer(0, error="closed"), "no answer"),
        (answer(400, {"detail": "n"}), "no error object"),
        (answer(400, {"error": {"message": "n"}}), "without"),
        (answer(400, {"error": ERROR | {"message": "x", "param": "m"}}), "does not name n"),
    ],
)
def test_what_an_answer_must_be(given: Answer, fault: str) -> None:
    found = fault_of_answer(given, names=("n",))
    assert found.find(fault) >= 0
    assert bool(found) == bool(fault)


def test_the_hundred_are_a_hundred_requests() -> None:
    assert len(HOSTILE) == len({each.name for each in HOSTILE}) == 100
    bodies = {(h.wire.path, h.wire.method, h.wire.headers, h.wire.body()) for h in HOSTILE}
    assert len(bodies) == 100
    unnamed = [h for h in HOSTILE if not h.names and not h.is_http]
    assert all(isinstance(h.wire.content, bytes) or callable(h.wire.content) for h in unnamed)
    assert len(CASES) >= 60


def test_the_report_says_what_broke_and_what_is_missing(tmp_path: Path) -> None:
    async def run(board: Board, tally: Tally) -> None:
        tally.check("the case", False, "why")

    report = BoardReport(
        results=results([row(run)], settings(tmp_path)),
        size="quick",
        seed=0,
        machine="a machine",
        command="qwenkit bench reliability",
        seconds=60.0,
    )
    text = report.to_markdown()
    assert "| 9 | hostile requests | 0/1 | 0.00 s | – | it holds |" in text
    assert "Row 9 broke its promise: the case." in text
    assert "23 (kill -9 in training)" in text
    assert report.to_json()["holds"] is False


def test_a_section_of_the_numbers_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "numbers.md"
    page.write_text("# Numbers\n\n## One\n\nold \\1\n\n## Two\n\ntwo\n")
    write_section(page, "One", "new \\1")
    write_section(page, "Three", "three")
    assert page.read_text() == (
        "# Numbers\n\n## One\n\nnew \\1\n\n## Two\n\ntwo\n\n## Three\n\nthree\n"
    )
    with pytest.raises(UsageError, match="no file"):
        write_section(tmp_path / "absent.md", "One", "x")


def test_tests_are_counted_as_cases(tmp_path: Path) -> None:
    test = "import pytest\n@pytest.mark.parametrize('n', [0, 1, 2])\ndef test_n(n):\n"
    (tmp_path / "test_a.py").write_text(f"{test}    n == 2 and pytest.skip('no')\n    assert n\n")
    (tmp_path / "test_b.py").write_text("import pytest\npytest.skip('none', allow_module_level=1)")
    board, tally, skipped = Board(settings(tmp_path, checkout=tmp_path)), Tally(), Tally()
    asyncio.run(run_tests(board, tally, ("test_a.py",)))
    assert (tally.passed, tally.total, tally.figures) == (1, 2, {"skipped": 1})
    asyncio.run(run_tests(board, skipped, ("test_b.py",)))
    assert skipped.unavailable is not None
    assert "none" in skipped.unavailable
    asyncio.run(run_tests(board, skipped, ("absent.py",)))
    assert skipped.unavailable == "this checkout has no absent.py"


def test_a_report_of_the_fuzz_is_counted(tmp_path: Path) -> None:
    request = {
        "method": "POST",
        "uri": "http://h:1/v1/x?y=1",
        "headers": {"Authorization": ["Bearer k"], "X": ["1"]},
        "body": {"$base64": "e30="},
    }
    good = {"request": request, "response": {"status_code": 200, "elapsed": 0.5}}
    bad = {"request": request, "response": {"status_code": 500, "elapsed": 0.1}}
    recorder = {
        "label": "POST /v1/x",
        "checks": {"b": [{"name": "not_a_server_error", "status": "failure"}]},
        "interactions": {"a": good, "b": bad, "c": {"request": request, "response": None}},
    }
    lines = [{"Initialize": {}}, {"ScenarioFinished": {"recorder": recorder}}]
    lines.append({"ScenarioFinished": {"recorder": {"label": "GET /y"}}})
    report = tmp_path / "report.ndjson"
    report.write_text("\n".join(map(json.dumps, lines)))
    tally = Tally()
    read_report(report, tally)
    assert (tally.passed, tally.total, tally.worst_s) == (1, 3, 0.5)
    assert tally.figures == {"2xx": 1, "5xx": 1, "no answer": 1, "operations": 2}
    kept = Wire.from_json(tally.failures[0].given)
    assert (kept.path, kept.body(), kept.headers) == ("/v1/x?y=1", b"{}", (("X", "1"),))


def test_statistics() -> None:
    flat, steep = [(n, 5) for n in range(9)], [(n, 3 * n + 1) for n in range(9)]
    assert slope_of(flat) == 0
    assert slope_of(steep) == pytest.approx(3)
    assert slope_of(steep[:1]) == 0
    near = [1.0 + n % 7 / 100 for n in range(200)]
    assert abs(welch_t(near, near)) < 1e-9
    assert welch_t([value + 1 for value in near], near) > 100


def test_the_command_refuses_unknown_rows_and_writes_files(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "no row 99" in run(app, ["bench", "reliability", "--rows", "9,99"]).output
    assert "expected numbers" in run(app, ["bench", "reliability", "--rows", "x"]).output
    page = tmp_path / "numbers.md"
    page.write_text("# Numbers\n")
    files = ["--json", str(tmp_path / "out.json"), "--numbers", str(page)]
    url = ["--rows", "12", "--url", "http://127.0.0.1:9"]
    done = run(app, ["bench", "reliability", *url, *files], env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.exit_code == 0, done.output
    assert "12  disconnects" in done.output
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["unavailable"]
    assert f"## {HEADING}\n" in page.read_text()
