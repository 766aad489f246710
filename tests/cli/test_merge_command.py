"""`qwenkit merge`, and answers with an adapter by --adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters_made import write_made_adapter
from qwenkit.cli.loading import read_adapter_option
from qwenkit.cli.main import app
from qwenkit.errors import UsageError
from qwenkit.load import load
from qwenkit.save import save_gguf
from tiny import write_tiny_checkpoint

runner = CliRunner()
Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("merge")
    model = write_tiny_checkpoint(folder / "model", config={"intermediate_size": 64})
    return model, write_made_adapter(folder / "mine", load(model).model)


def generated(*arguments: object) -> Any:
    given = ("--prompt", "a question", "--max-tokens", "12", "--greedy", "--json")
    done = runner.invoke(app, ["generate", *map(str, arguments), *given])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["token_ids"]


def test_a_merged_model_answers_as_the_model_with_its_adapter(
    folders: Folders, tmp_path: Path
) -> None:
    model, adapter = folders
    out = tmp_path / "out"
    done = runner.invoke(app, ["merge", str(model), str(adapter), str(out), "--shard-size", "20KB"])
    assert done.exit_code == 0, done.output
    assert "files of weights" in done.stdout
    assert len(list(out.glob("model-*.safetensors"))) > 1
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes().strip() == (model / name).read_bytes().strip() or (
            json.loads((out / name).read_text()) == json.loads((model / name).read_text())
        )
    answer = generated(model, "--adapter", adapter)
    assert answer == generated(model, "--adapter", f"other={adapter}") == generated(out)
    assert answer != generated(model)


def test_a_quantized_model_is_merged_only_into_numbers(folders: Folders, tmp_path: Path) -> None:
    from qwenkit.formats.ggml import GgmlWeight
    from qwenkit.formats.ggml_quantize import quantize_blocks
    from qwenkit.layers.linear import Linear

    model, adapter = folders
    loaded = load(model)
    for module in loaded.model.modules():
        if isinstance(module, Linear):
            blocks = quantize_blocks(module.weight.detach(), "Q8_0")
            del module.weight
            module.weight = GgmlWeight(blocks, "Q8_0")
    save_gguf(loaded, tmp_path / "q8.gguf")
    given = ["merge", str(tmp_path / "q8.gguf"), str(adapter), str(tmp_path / "out")]
    refused = runner.invoke(app, given)
    assert refused.exit_code == 2
    assert "is quantized (Q8_0)" in refused.stderr
    assert "dequantize" in refused.stderr
    assert runner.invoke(app, [*given, "--dequantize"]).exit_code == 0
    got = load(tmp_path / "out").model.get_parameter("model.layers.1.mlp.up_proj.weight")
    exact = tmp_path / "exact"
    assert runner.invoke(app, ["merge", str(model), str(adapter), str(exact)]).exit_code == 0
    expected = load(exact).model.get_parameter("model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(got, expected, rtol=0, atol=0.01)


def test_values_of_the_adapter_option(tmp_path: Path) -> None:
    assert read_adapter_option("a=b/c") == {"a": "b/c"}
    assert read_adapter_option("some/where/mine/") == {"mine": "some/where/mine/"}
    assert read_adapter_option("some/rank=8") == {"rank=8": "some/rank=8"}
    (tmp_path / "x=y").mkdir()
    assert read_adapter_option(str(tmp_path / "x=y")) == {"x=y": str(tmp_path / "x=y")}
    for wrong in ("", "=b", "a="):
        with pytest.raises(UsageError, match="--adapter: got"):
            read_adapter_option(wrong)


def test_misuse_is_named(folders: Folders, tmp_path: Path) -> None:
    model, adapter = folders
    for given, said in (
        ([model, model, tmp_path / "o"], "is no adapter"),
        ([model, adapter, model], "is the folder that the model was read from"),
        ([model, adapter, tmp_path / "o", "--shard-size", "big"], "shard size: got 'big'"),
    ):
        done = runner.invoke(app, ["merge", *map(str, given)])
        assert done.exit_code in (1, 2)
        assert said in done.stderr
