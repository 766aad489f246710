"""`qwenkit tokenizer`: what is shown of tokens, and words that become tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenkit.cli import console
from qwenkit.cli.main import app
from qwenkit.cli.tokenizer_show import TokenRow
from qwenkit.tokenizer import from_folder, write_folder
from tiny import write_tiny_checkpoint


@pytest.fixture
def run() -> CliRunner:
    return CliRunner(env={"COLUMNS": "60", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" Panda\n", "␠Panda␊"),
        (b"\t\x00\x1b[2J", "␉␀␛[2J"),
        (b"\x7f\xc2\x85", "\\x7f\\x85"),
        (b" \xe6\xa0", "␠\\xe6\\xa0"),
        ("\u0301x".encode(), "◌\u0301x"),
        ("\u202e\u200d\ufeff".encode(), "\\u202e\\u200d\\ufeff"),
        ("猫".encode(), "猫"),
    ],
)
def test_everything_in_a_token_is_visible(data: bytes, shown: str) -> None:
    assert TokenRow(0, data, False).shown == shown


def test_a_pipe_gets_a_token_a_line(run: CliRunner, folder: Path) -> None:
    done = run.invoke(app, ["tokenizer", "show", str(folder), "é\n<|im_end|>", "--allow-special"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "195\tc3\t\\xc3",
        "169\ta9\t\\xa9",
        "10\t0a\t␊",
        "258\t3c 7c 69 6d 5f 65 6e 64 7c 3e\t<|im_end|>\tcontrol",
    ]
    assert done.stderr.splitlines() == [
        "4 tokens, 13 bytes (3.25 a token), 12 characters (3.00 a token)"
    ]


def test_what_is_only_text_is_said(run: CliRunner, folder: Path) -> None:
    done = run.invoke(app, ["tokenizer", "show", str(folder), "e\u0301<|im_end|>"])
    assert "258\t" not in done.stdout
    assert "Not exact: the text does not survive exactly: characters are composed" in done.stderr
    assert "<|im_end|>: plain text here; --allow-special" in done.stderr


def test_a_terminal_gets_a_table_that_fits(
    run: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "is_watched", lambda: True)
    text = "a <|im_start|>" + "猫"
    done = run.invoke(app, ["tokenizer", "show", str(folder), text, "--allow-special"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert any(line.split() == ["97", "61", "a"] for line in lines)
    assert any("<|im_start|>" in line for line in lines)
    assert all(len(line) <= 60 for line in lines)


def test_json_and_standard_input(run: CliRunner, folder: Path) -> None:
    done = run.invoke(app, ["tokenizer", "show", str(folder), "-", "--json"], input="hi\n")
    told = json.loads(done.stdout)
    assert (told["tokens"], told["bytes"], told["characters"]) == (3, 3, 3)
    assert told["rows"][0] == {"id": 104, "bytes": "68", "text": "h", "control": False}


def test_an_empty_text_has_no_tokens(run: CliRunner, folder: Path) -> None:
    done = run.invoke(app, ["tokenizer", "show", str(folder), ""])
    assert (done.stdout, done.stderr) == ("", "0 tokens\n")


def test_too_many_words(run: CliRunner, folder: Path) -> None:
    done = run.invoke(app, ["tokenizer", "show", str(folder), "two", "words"])
    assert done.exit_code == 2
    assert "A text with spaces needs quotes" in done.stderr


def _add(run: CliRunner, tmp_path: Path, source: Path, *options: str) -> tuple[int, str, str]:
    words = tmp_path / "words.txt"
    words.write_text("abc\t3\nabd\t2\nx y\t1\n")
    arguments = [str(source), str(tmp_path / "extra.tiktoken"), str(words), *options]
    done = run.invoke(app, ["tokenizer", "add-merges", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_words_become_tokens(run: CliRunner, folder: Path, tmp_path: Path) -> None:
    new, hf = tmp_path / "new", tmp_path / "hf"
    options = ["--model", str(folder), "--out", str(new), "--hf-folder", str(hf)]
    code, told, remarks = _add(run, tmp_path, folder, *options)
    assert code == 0, remarks
    assert told.splitlines()[0].endswith("extra.tiktoken: 3 merges for 2 words, ids 464 to 466.")
    assert told.splitlines()[1].endswith("tokenizer_config.json, 467 ids.")
    assert told.splitlines()[2].endswith(
        "new: the model with 467 ids, 480 rows as before, padding used."
    )
    assert remarks.startswith("'x y' is left out")
    assert (tmp_path / "extra.tiktoken").read_bytes() == b"YWI= 464\nYWJj 465\nYWJk 466\n"
    for written in (new, hf):
        assert from_folder(written).encode("abcabdab") == [465, 466, 464]


@pytest.mark.parametrize(
    ("start", "first"), [("--start_id=500", 500), ("--start-id=-1", 256), ("--start_id=0", 256)]
)
def test_the_first_id(run: CliRunner, folder: Path, tmp_path: Path, start: str, first: int) -> None:
    code, told, remarks = _add(run, tmp_path, folder / "qwen.tiktoken", start)
    assert code == 0
    assert f"ids {first} to {first + 2}" in told
    assert ("Ids of control tokens (<|endoftext|> …) are among them" in remarks) == (first == 256)


def test_the_originals_default_and_a_first_id_that_is_taken(
    run: CliRunner, folder: Path, tmp_path: Path
) -> None:
    assert "ids 151851 to 151853" in _add(run, tmp_path, folder / "qwen.tiktoken")[1]
    _, told, remarks = _add(run, tmp_path, folder, "--start_id", "7")
    assert "--start_id 7 is taken by a regular token; 256 it is" in remarks
    assert "ids 256 to 258" in told


def test_a_first_id_that_no_tokenizer_takes_is_refused(
    run: CliRunner, folder: Path, tmp_path: Path
) -> None:
    highest = 464 + (1 << 16)
    code, _, remarks = _add(run, tmp_path, folder, "--start-id", str(highest + 1))
    assert (code, f"at most {highest} on" in " ".join(remarks.split())) == (2, True)
    assert _add(run, tmp_path, folder, "--start-id", str(highest))[0] == 0
    extra = tmp_path / "extra.tiktoken"
    grown = from_folder(folder, extra_vocab_file=extra)
    assert grown.encode("abc") == [highest + 1]


@pytest.mark.parametrize("way", ["same", "spelling", "symlink", "hard link", "in the folder"])
def test_what_is_read_is_not_overwritten(
    run: CliRunner, folder: Path, tmp_path: Path, way: str
) -> None:
    source = tmp_path / "qwen.tiktoken"
    source.write_bytes((folder / "qwen.tiktoken").read_bytes())
    before = source.read_bytes()
    words, output = tmp_path / "words.txt", source
    words.write_text("abc\t3\n")
    if way == "spelling":
        output = tmp_path / "." / ".." / tmp_path.name / "qwen.tiktoken"
    elif way == "symlink":
        output = tmp_path / "link.tiktoken"
        output.symlink_to(source)
    elif way == "hard link":
        output = tmp_path / "link.tiktoken"
        output.hardlink_to(source)
    given = str(tmp_path if way == "in the folder" else source)
    done = run.invoke(app, ["tokenizer", "add-merges", given, str(output), str(words)])
    assert done.exit_code == 2
    assert "which is read, and would be overwritten; give another file." in " ".join(
        done.stderr.split()
    )
    assert source.read_bytes() == before


@pytest.mark.parametrize("way", ["--hf-folder", "--out", "tokenizer.json"])
def test_the_folder_that_is_read_is_not_overwritten(
    run: CliRunner, folder: Path, tmp_path: Path, way: str
) -> None:
    source = shutil.copytree(folder, tmp_path / "model")
    if way == "tokenizer.json":
        write_folder(from_folder(source), source)
    before = {file: file.read_bytes() for file in source.iterdir()}
    given = source / way if way == "tokenizer.json" else source
    options = ["--hf-folder", str(source)]
    if way == "--out":
        options = ["--model", str(source), "--out", str(source / "." / ".." / "model")]
    code, _, remarks = _add(run, tmp_path, given, *options)
    assert code == 2
    assert "which is read, and would be overwritten; give another folder." in " ".join(
        remarks.split()
    )
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert not (tmp_path / "extra.tiktoken").exists()


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        (".", [], "is a folder; give the .tiktoken file to write."),
        ("gone/x.tiktoken", [], "there is no folder"),
        ("/dev/null", [], "is no regular file"),
        ("x.tiktoken", ["--hf-folder", "words.txt"], "--hf-folder: 'words.txt' is a file"),
        ("x.tiktoken", ["--model", "{}", "--out", "words.txt/x"], "--out: 'words.txt' is a file"),
    ],
)
def test_what_cannot_be_written_is_refused(
    run: CliRunner,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("abc\t3\n")
    given = [option.format(folder) for option in options]
    command = ["tokenizer", "add-merges", str(folder), output, "words.txt", *given]
    done = run.invoke(app, command)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_what_does_not_go_together(run: CliRunner, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tiktoken"
    other.write_bytes((folder / "qwen.tiktoken").read_bytes() + b"enp6 900\n")
    code, _, remarks = _add(run, tmp_path, folder, "--model", str(folder))
    assert (code, "--model and --out belong together" in remarks) == (2, True)
    options = ["--model", str(folder), "--out", str(tmp_path / "new")]
    code, _, remarks = _add(run, tmp_path, other, *options)
    assert code == 2
    assert "has another vocabulary" in remarks
    assert "(regular tokens: 256 and 257)" in remarks
