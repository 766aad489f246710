"""The files of a batch: what is taken as requests and as answers, and what of them is kept."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from qwenkit.errors import CheckpointError, UsageError
from qwenkit.server.batch_files import (
    check_apart,
    check_input,
    drop_replaced,
    open_output,
    requests_of,
)


def asked(custom_id: Any, **changed: Any) -> dict[str, Any]:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {}}
    return line | changed


def answer(custom_id: str, status: int = 200, said: str = "") -> dict[str, Any]:
    response = {"status_code": status, "request_id": None, "body": {"said": said}}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}


def text_of(*lines: Any) -> str:
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def refused(source: Path, *lines: Any) -> str:
    source.write_text(text_of(*lines), encoding="utf-8")
    with pytest.raises(UsageError) as found:
        check_input(source)
    return str(found.value)


def test_requests_that_no_batch_can_do_are_refused_by_line(source: Path) -> None:
    said = refused(
        source,
        asked("a"),
        asked("b", url="/v1/models"),
        asked("c", method="GET"),
        {"custom_id": "d"},
        asked("e", url=["/v1/completions"]),
    )
    urls = "/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses"
    assert f"line 2: url: got '/v1/models'; allowed: {urls}; " in said
    assert "line 3: method: got 'GET'; allowed: POST; " in said
    assert f"line 4: url is missing; allowed: {urls}; " in said
    assert "line 5: url: got ['/v1/completions']" in said
    assert "line 1" not in said


def test_a_custom_id_is_a_text(source: Path) -> None:
    said = refused(source, asked(1), asked(None), {"url": "/v1/completions"}, [])
    assert 'line 1: custom_id must be a string, such as "1"; got 1;' in said
    assert 'line 2: custom_id must be a string, such as "1"; got None;' in said
    assert "line 3: custom_id is missing" in said
    assert "line 4: expected an object with custom_id" in said


def test_the_mark_of_utf_8_is_no_part_of_the_requests(source: Path) -> None:
    source.write_text(text_of(asked("a"), asked("b")), encoding="utf-8-sig")
    assert check_input(source) == {"a", "b"}
    assert [one.custom_id for one in requests_of(source)] == ["a", "b"]
    source.write_text(text_of(asked("a")), encoding="utf-16")
    with pytest.raises(UsageError, match="line 1: it is not UTF-8"):
        check_input(source)


def test_input_and_output_are_two_files(source: Path, output: Path) -> None:
    source.write_text(text_of(asked("a")), encoding="utf-8")
    check_apart(source, output)
    output.symlink_to(source)
    for same in (source, output, source.parent / "." / "in.jsonl"):
        with pytest.raises(UsageError, match="are one file"):
            check_apart(source, same)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (text_of(asked("b")), "is no answer with custom_id, response and error"),
        (text_of([]), "is no answer"),
        (text_of({"response": {}, "error": None}), "is no answer"),
        (text_of({"custom_id": ["b"], "response": {}}), "is no answer"),
        ("notes\n", "is no answer"),
        ("notes that do not end", "is no answer"),
        (json.dumps({"custom_id": "b", "response": {}}), "does not end with a line break"),
    ],
)
def test_an_output_of_other_lines_is_refused_and_left_alone(
    output: Path, last: str, reason: str
) -> None:
    whole = text_of(answer("a")) + last
    output.write_text(whole, encoding="utf-8")
    with pytest.raises(UsageError, match=f"line 2: .* no output of a batch: this line {reason}"):
        open_output(output, {"a", "b"})
    assert output.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("torn", ["{", '{"id": "batch_r', text_of(answer("b")).rstrip()])
def test_a_torn_line_is_cut_off(output: Path, torn: str) -> None:
    output.write_text(text_of(answer("a")) + torn, encoding="utf-8")
    file, answered = open_output(output, {"a", "b"})
    file.close()
    assert answered == {"a": True}
    assert output.read_text(encoding="utf-8") == text_of(answer("a"))


def test_what_failed_is_told_apart(output: Path) -> None:
    lines = [
        answer("well"),
        answer("refused", 400),
        {"custom_id": "never sent", "response": None, "error": {"code": "expired"}},
        {"custom_id": "half", "response": {"status_code": 200}, "error": {"code": "x"}},
    ]
    output.write_text(text_of(*lines), encoding="utf-8")
    file, answered = open_output(output, {line["custom_id"] for line in lines})
    file.close()
    assert answered == {"well": True, "refused": False, "never sent": False, "half": False}


def test_a_run_that_was_killed_before_it_cleared_up_has_lost_nothing(output: Path) -> None:
    lines = [
        answer("a", 500, "first"),
        answer("b"),
        answer("c", 500, "first"),
        answer("a", 200, "second"),
        answer("c", 500, "second"),
        answer("b", 500, "put there by hand"),
    ]
    output.write_text(text_of(*lines), encoding="utf-8")
    output.chmod(0o600)
    link = output.with_name("link.jsonl")
    link.symlink_to(output)
    file, answered = open_output(link, {"a", "b", "c", "d"})
    with file:
        assert answered == {"a": True, "b": True, "c": False}
        file.write(text_of(answer("d")).encode())  # into the new file
    kept = text_of(lines[1], lines[3], lines[4], answer("d"))
    assert output.read_text(encoding="utf-8") == kept
    assert link.is_symlink()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_clearing_up_is_one_step(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.write_text(text_of(answer("a", 500)), encoding="utf-8")
    file, _ = open_output(output, {"a"})
    with file, monkeypatch.context() as patched:
        file.write(text_of(answer("a")).encode())

        def fail(_: Path, __: Path) -> None:
            assert output.read_text(encoding="utf-8") == whole
            raise OSError("the disk is gone")

        whole = text_of(answer("a", 500), answer("a"))
        patched.setattr(Path, "replace", fail)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            drop_replaced(file, output, {"a"})
        assert output.read_text(encoding="utf-8") == whole
        patched.undo()
        drop_replaced(file, output, {"a"})
    assert output.read_text(encoding="utf-8") == text_of(answer("a"))
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_two_runs_do_not_write_one_file(output: Path) -> None:
    file, _ = open_output(output, set())
    with file, pytest.raises(UsageError, match="is being written by another run"):
        open_output(output, set())
