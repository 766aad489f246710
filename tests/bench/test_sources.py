"""What each engine reads: the same random weights, in its own form, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenkit.bench import sources
from qwenkit.bench.peers.spec import Options, WeightSetting
from qwenkit.bench.process import Launch
from qwenkit.bench.random_model import write_random_folder, write_random_gguf
from qwenkit.bench.shapes import shape
from qwenkit.bench.sources import Source, launch_for
from qwenkit.checkpoint.folder import open_checkpoint
from qwenkit.errors import QwenkitError
from qwenkit.models.spec import find

OPTIONS = Options(threads=1, most_prompt_tokens=8, most_positions=20)
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made, instead of making it."""
    seen: list[str] = []

    def gguf(
        path: Path, config: object, *, storage: str, head_storage: str, **more: object
    ) -> None:
        seen.append(f"{storage}/{head_storage}")
        path.write_bytes(b"")

    def folder(path: Path, config: object, **more: object) -> None:
        seen.append("folder")
        path.mkdir()

    def prepare(launch: Launch, target: Path) -> None:
        seen.append(f"{launch.engine} from {launch.model.name}")
        target.mkdir()

    monkeypatch.setattr(sources, "write_random_gguf", gguf)
    monkeypatch.setattr(sources, "write_random_folder", folder)
    monkeypatch.setattr(sources, "prepare_files", prepare)
    return seen


def launch(engine: str, source: Source, cache: Path) -> Launch:
    return launch_for(engine, "python", source, OPTIONS, cache, lambda what, share: None)


def test_random_weights_are_made_once_and_each_engine_gets_its_form(
    tmp_path: Path, made: list[str]
) -> None:
    source = Source(shape="qwen2-0.5b", weights=WeightSetting(name="int4", group_size=32))
    for _ in range(2):
        assert launch("qwenkit", source, tmp_path).model.name == "checkpoint"
        assert launch("llama.cpp", source, tmp_path).model.name == "Q4_0-head-Q8_0.gguf"
        assert launch("onnxruntime", source, tmp_path).model.name == "onnxruntime-int4-g32"
        assert launch("transformers", source, tmp_path).model.name == "checkpoint"
    assert made == ["folder", "Q4_0/Q8_0", "onnxruntime from checkpoint"]
    assert launch("qwenkit", source, tmp_path).options.weights == source.weights


def test_a_stored_kind_is_ours_as_it_is_and_the_nearest_to_others(
    tmp_path: Path, made: list[str]
) -> None:
    source = Source(shape="qwen2-0.5b", storage="Q8_0")
    ours = launch("qwenkit", source, tmp_path)
    assert ours.model == launch("llama.cpp", source, tmp_path).model
    assert ours.options.weights is None
    assert launch("vllm", source, tmp_path).options.weights == WeightSetting(
        name="int8", group_size=32
    )
    with pytest.raises(QwenkitError, match="--weights"):
        launch("openvino", Source(shape="qwen2-0.5b", storage="Q5_1"), tmp_path)


def test_a_model_that_an_engine_cannot_read_is_refused(tmp_path: Path, made: list[str]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert launch("llama.cpp", Source(model=file), tmp_path).model == file
    with pytest.raises(QwenkitError, match="hub's layout"):
        launch("vllm", Source(model=file), tmp_path)
    with pytest.raises(QwenkitError, match="gguf"):
        launch("llama.cpp", Source(model=tmp_path), tmp_path)
    with pytest.raises(QwenkitError, match="--weights"):
        launch("onnxruntime", Source(model=tmp_path), tmp_path)


def test_what_could_not_be_made_leaves_nothing(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(launch: Launch, target: Path) -> None:
        target.mkdir()
        raise QwenkitError("no")

    monkeypatch.setattr(sources, "prepare_files", broken)
    source = Source(shape="qwen2-0.5b", weights=WeightSetting(name="int8"))
    with pytest.raises(QwenkitError, match="no"):
        launch("openvino", source, tmp_path)
    assert [p.name for p in (tmp_path / "random" / "qwen2-0.5b").iterdir()] == ["checkpoint"]


def test_both_forms_of_random_weights_hold_the_same_numbers(tmp_path: Path) -> None:
    config = shape("qwen2-0.5b") | SMALL
    write_random_folder(tmp_path / "folder", config, seed=3)
    write_random_gguf(tmp_path / "m.gguf", config, storage="BF16", seed=3)
    wide, stored = open_checkpoint(tmp_path / "folder"), open_checkpoint(tmp_path / "m.gguf")
    names = find("qwen2").gguf_names
    assert {names[t.replace(".0.", ".{}.")].format(0) for t in stored.tensors} == set(wide.tensors)
    for name, tensor in stored.tensors.items():
        ours = names[name.replace(".0.", ".{}.")].format(0)
        assert torch.equal(wide.tensors[ours].read(), tensor.read().to(torch.bfloat16)), name
