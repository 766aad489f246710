"""The perplexity table: its numbers, how it goes on after an interruption, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from torch.nn import functional
from typer.testing import CliRunner

from qwenkit.bench.methods import METHODS
from qwenkit.bench.perplexity import (
    PerplexitySettings,
    PerplexityTable,
    measure_perplexity,
    read_table,
    write_table,
)
from qwenkit.cli.main import app
from qwenkit.errors import UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import Loaded, load
from tiny import write_tiny_checkpoint

TRAINED = 32
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LENGTHS = (16, 32, 40, 64, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"max_position_embeddings": TRAINED, "rope_scaling": ROPE}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("perplexity") / "tiny", config=config)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def ids(count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def measure(
    loaded: Loaded, methods: tuple[str, ...], lengths: tuple[int, ...] = LENGTHS, windows: int = 1
) -> PerplexityTable:
    settings = PerplexitySettings(methods=methods, lengths=lengths, windows=windows)
    table = fresh(windows)
    return measure_perplexity(loaded, ids(300), settings, table, save=lambda done: None)


def fresh(windows: int = 1) -> PerplexityTable:
    return PerplexityTable(model="tiny", text="t", trained_tokens=TRAINED, windows=windows)


def test_as_config_is_the_models_own_loss(loaded: Loaded) -> None:
    table = measure(loaded, ("as-config", "yarn"), windows=2)
    for length in LENGTHS:
        means = []
        for first in (0, 150):
            part = torch.tensor(ids(300)[first : first + length])
            with torch.inference_mode():
                logits = loaded.model(part, PackedCausal([length]))
            means.append(functional.cross_entropy(logits[:-1], part[1:]).item())
        for method in ("as-config", "yarn"):
            assert table.cells[method][length] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_below_the_trained_length_only_what_is_always_on_changes_anything(loaded: Loaded) -> None:
    cells = measure(loaded, tuple(METHODS)).cells
    assert list(cells) == list(METHODS)
    for length in (16, 32):
        for method in ("per-request", "dynamic", "qwen-ntk", "qwen-ntk+logn"):
            assert cells[method][length] == cells["none"][length], method
        for method in ("as-config", "linear", "yarn"):
            assert cells[method][length] != cells["none"][length], method
    assert cells["dual-chunk"][16] == cells["none"][16]  # one chunk of 24 - 2 tokens
    different = {round(cells[method][40], 9) for method in METHODS}
    assert len(different) == len(METHODS) - 1  # yarn is the config's own
    assert cells["per-request"][64] != cells["as-config"][64]  # factor 2, not 4
    assert cells["per-request"][128] == cells["as-config"][128]  # factor 4


def test_an_interrupted_measurement_goes_on(loaded: Loaded, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def save(done: PerplexityTable) -> None:
        write_table(tmp_path, done)
        raise Interrupted

    settings = PerplexitySettings(methods=("none", "yarn"), lengths=(16, 64))
    with pytest.raises(Interrupted):
        measure_perplexity(loaded, ids(300), settings, fresh(), save=save)
    kept = read_table(tmp_path / "perplexity.json", fresh())
    assert list(kept.cells) == ["none"]
    kept.cells["none"][16] = 1.25  # what is there is not measured again
    passes: list[str] = []
    done = measure_perplexity(
        loaded,
        ids(300),
        settings,
        kept,
        save=lambda table: passes.append("saved"),
        progress=lambda what, share: passes.append(what),
    )
    assert done.cells["none"][16] == 1.25
    assert set(done.cells["yarn"]) == {16, 64}
    assert passes == ["yarn 64", "saved"]


def test_the_files_say_the_same(tmp_path: Path) -> None:
    table = fresh()
    table.cells = {"none": {16: 1.0, 2048: 12.0}, "a<b": {16: 2.0}}
    write_table(tmp_path, table)
    data = json.loads((tmp_path / "perplexity.json").read_text())
    assert data["perplexity"]["none"]["16"] == pytest.approx(2.718281828)
    text = (tmp_path / "perplexity.md").read_text()
    assert "| none | 2.72 | 1.6e+05 |" in text
    assert "| a<b | 7.39 | – |" in text
    picture = ElementTree.fromstring((tmp_path / "perplexity.svg").read_text())
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert read_table(tmp_path / "perplexity.json", fresh()).cells == table.cells


def test_another_measurements_folder_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(fresh(), model="m", cells={"none": {16: 1.0}})
    write_table(tmp_path, other)
    with pytest.raises(UsageError, match="measured with model 'm', not 'tiny'"):
        read_table(tmp_path / "perplexity.json", fresh())
    (tmp_path / "perplexity.json").write_text("[]")
    with pytest.raises(UsageError, match="no such table"):
        read_table(tmp_path / "perplexity.json", fresh())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("yarm",)}, r"method: got 'yarm'\. Did you mean 'yarn'"),
        ({"lengths": (1,)}, "length"),
        ({"lengths": ()}, "length"),
        ({"windows": 0}, "windows"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object], message: str) -> None:
    given = {"methods": ("none",), "lengths": (16,), **wrong}
    with pytest.raises(UsageError, match=message):
        PerplexitySettings(**given)  # type: ignore[arg-type]


def test_a_text_that_is_too_short_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match=r"300 tokens; 3 windows of 128 need 384"):
        measure(loaded, ("none",), windows=3)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 4)
    arguments = [str(text), "--model", str(folder), "--out", str(tmp_path / "out")]
    more = ["--length", "16", "--length", "64", "--method", "none", "--compute", "reference"]
    result = CliRunner().invoke(app, ["bench", "perplexity", *arguments, *more])
    assert result.exit_code == 0, result.output
    assert "| method | 16 | 64 |" in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "perplexity.json",
        "perplexity.md",
        "perplexity.svg",
    }


@pytest.mark.parametrize("changed", ["nothing", "model", "text", "unknown"])
def test_a_name_alone_is_not_the_same_measurement(
    folder: Path, tmp_path: Path, changed: str
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("To be, or not to be, that is the question. ")

    def run(model: Path) -> Result:
        more = ["--length", "16", "--method", "none", "--compute", "reference", "--out", str(out)]
        return CliRunner().invoke(
            app, ["bench", "perplexity", str(text), "--model", str(model), *more]
        )

    assert run(folder).exit_code == 0
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    record = out / "perplexity.json"
    if changed == "model":
        weights = moved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))
    elif changed == "text":
        text.write_text("To be, or not to be, that was the question.")
    elif changed == "unknown":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"digests": {}}))
    before = record.read_bytes()
    result = run(moved)
    if changed == "nothing":
        assert result.exit_code == 0, result.output
        return
    why = {"unknown": "does not say which model"}.get(changed, f"another {changed} of the same")
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
    assert record.read_bytes() == before
