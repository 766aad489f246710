"""`qwenkit export`: a GGUF of any type, a folder, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.imatrix import ColumnSquares, Imatrix, read_imatrix, write_imatrix
from qwenkit.cli.main import app
from tiny import write_tiny_checkpoint


@pytest.fixture
def run() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"hidden_size": 64, "intermediate_size": 256}
    return write_tiny_checkpoint(tmp_path / "model", config=config)


def test_a_gguf_is_written_and_described(run: CliRunner, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = run.invoke(app, ["export", str(model), str(out), "--gguf", "Q4_K_M"])
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{out}: 0.1 MB of tensors, ")
    assert "1 Q6_K" in lines[0] or "2 Q6_K" in lines[0]
    assert "rows that are no whole blocks of the wanted type" in lines[1]
    assert open_checkpoint(out).gguf_metadata["general.file_type"] == 15
    again = run.invoke(app, ["export", str(out), str(tmp_path / "n.gguf"), "--gguf", "q8_0"])
    assert "were quantized before and are rounded a second time" in again.stdout
    before = out.read_bytes()
    over = run.invoke(app, ["export", str(out), str(out), "--gguf", "q8_0"])
    assert (over.exit_code, out.read_bytes()) == (2, before)
    assert "is there already" in over.stderr


def test_an_importance_matrix_is_used(run: CliRunner, model: Path, tmp_path: Path) -> None:
    entry = ColumnSquares(torch.rand(1, 64), torch.ones(1))
    file = tmp_path / "i.gguf"
    write_imatrix(Imatrix({"blk.0.attn_q.weight": entry}), file)
    call = ["export", str(model), str(tmp_path / "m.gguf"), "--gguf", "q4_0"]
    done = run.invoke(app, [*call, "--imatrix", str(file)])
    assert done.exit_code == 0, done.stderr
    assert "13 matrices have no entry in the importance matrix, such as blk.0" in done.stdout
    metadata = open_checkpoint(tmp_path / "m.gguf").gguf_metadata
    assert metadata["quantize.imatrix.file"] == "i.gguf"


def test_a_folder_is_written_and_padded(run: CliRunner, model: Path, tmp_path: Path) -> None:
    call = ["export", str(model), "--folder", str(tmp_path / "out")]
    done = run.invoke(app, call)
    assert done.stdout == f"{tmp_path / 'out'}: 1 file of weights.\n"
    done = run.invoke(app, [*call, "--pad-for-tp", "2"])
    assert done.stdout.splitlines()[1] == "Every width splits over 2 devices as it is."
    done = run.invoke(app, [*call, "--pad-for-tp", "8", "--group-size", "64"])
    lines = done.stdout.splitlines()
    assert lines[1] == "intermediate_size: 256 wide, padded to 512."
    assert lines[2].startswith("num_attention_heads is 4, which 8 does not divide; no padding")
    assert open_checkpoint(tmp_path / "out").config["intermediate_size"] == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Say what to write: --gguf TYPE, one of f32, f16,"),
        (["--gguf", "q8_0", "--folder"], "Say what to write"),
        (["--gguf", "q4_k_l"], "--gguf: got 'q4_k_l'. Did you mean 'q4_k_"),
        (["--folder", "--imatrix", "x"], "--imatrix: only for --gguf."),
        (["--folder", "--calibrate", "x"], "--calibrate: only for --gguf."),
        (["--gguf", "q8_0", "--imatrix", "x", "--calibrate", "x"], "give one of them"),
        (["--gguf", "q8_0", "--save-imatrix", "x"], "--save-imatrix: only with --calibrate."),
        (["--gguf", "q8_0", "--calibrate", "/none/x"], "data: '/none/x' cannot be read"),
        (["--gguf", "q8_0", "--pad-for-tp", "2"], "--pad-for-tp: only for --folder"),
        (["--folder", "--group-size", "64"], "--group-size: only for --pad-for-tp."),
        (["--gguf", "q8_0", "--imatrix", "/none/x"], "/none/x: imatrix: cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str], message: str, run: CliRunner, model: Path, tmp_path: Path
) -> None:
    done = run.invoke(app, ["export", str(model), str(tmp_path / "x"), *options])
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "x").exists()


def test_an_importance_matrix_is_computed_and_kept(
    run: CliRunner, model: Path, tmp_path: Path
) -> None:
    text, kept = tmp_path / "text.txt", tmp_path / "kept.gguf"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    call = ["export", str(model), str(first), "--gguf", "iq4_nl", "--calibrate", str(text)]
    done = run.invoke(app, [*call, "--rows", "3", "--max-len", "64", "--save-imatrix", str(kept)])
    assert done.exit_code == 0, done.stderr
    assert "no entry" not in done.stdout
    imatrix = read_imatrix(kept)
    assert (imatrix.datasets, imatrix.chunks, imatrix.chunk_tokens) == (("text.txt",), 3, 64)
    call = ["export", str(model), str(second), "--gguf", "iq4_nl", "--imatrix", str(kept)]
    assert run.invoke(app, call).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    plain = tmp_path / "c.gguf"
    run.invoke(app, ["export", str(model), str(plain), "--gguf", "iq4_nl"])
    name = "blk.0.attn_q.weight"
    blocks = [open_checkpoint(file).tensors[name].read() for file in (first, plain)]
    assert not torch.equal(*blocks)
