"""Loading: every tensor in its place or an error with its name; nothing expanded needlessly."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from qwenkit.kernels import devices
from qwenkit.kernels.devices import Device
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import load, load_tokenizer
from qwenkit.types.sampling import SamplingParams
from tiny import CONFIG, ENDOFTEXT, IM_END, tiny_tensors, write_tiny_checkpoint


def test_a_folder_loads_and_computes(tmp_path: Path) -> None:
    shares: list[float] = []
    loaded = load(write_tiny_checkpoint(tmp_path), progress=shares.append)
    logits = loaded.model(torch.arange(5), PackedCausal([5]))
    assert logits.shape == (5, 480)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_sharded_and_single_files_give_the_same_numbers(tmp_path: Path) -> None:
    one = load(write_tiny_checkpoint(tmp_path / "one"))
    many = load(write_tiny_checkpoint(tmp_path / "many", shard_bytes=20_000))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    ids = torch.arange(9)
    first, second = (x.model(ids, PackedCausal([9])) for x in (one, many))
    assert torch.equal(first, second)


def test_a_tied_head_needs_no_tensor_and_shares_memory(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    tensors = tiny_tensors(CONFIG | tied)
    assert "lm_head.weight" not in tensors
    model = load(write_tiny_checkpoint(tmp_path, config=tied, tensors=tensors)).model
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert model.get_parameter("lm_head.weight") is embedding


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    tensors = tiny_tensors(CONFIG | tied)
    embedding = tensors["model.embed_tokens.weight"]
    same = tensors | {"lm_head.weight": embedding.clone()}
    load(write_tiny_checkpoint(tmp_path / "same", config=tied, tensors=same))
    other = tensors | {"lm_head.weight": embedding + 1}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs"):
        load(write_tiny_checkpoint(tmp_path / "other", config=tied, tensors=other))


def _without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return tensors


def _extra(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}


def _extra_below_a_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}


def _other_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.zeros(31)}


def _other_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"model\.layers\.1\.mlp\.up_proj\.weight: is missing"),
        (_extra, r"belong to no part.*model\.layers\.2\.mlp\.up_proj\.weight"),
        (_extra_below_a_layer, r"belong to no part.*o_proj\.bias"),
        (_other_shape, r"model\.norm\.weight: has shape \(31,\).*\(32,\)"),
        (_other_storage, r"model\.norm\.weight: .*I8"),
    ],
)
def test_a_tensor_out_of_place_is_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write_tiny_checkpoint(tmp_path, tensors=change(tiny_tensors(CONFIG))))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 300}
    with pytest.raises(CheckpointError, match="464 ids"):
        load(write_tiny_checkpoint(tmp_path, config=small))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"qwen2"', '"gpt_neox"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="gpt_neox"):
        load(tmp_path)


def test_float16_is_never_chosen_on_a_processor(tmp_path: Path) -> None:
    tensors = {n: t.half() for n, t in tiny_tensors(CONFIG).items()}
    folder = write_tiny_checkpoint(tmp_path, tensors=tensors)
    assert load(folder).model.dtype == torch.float32
    with pytest.raises(UsageError, match="float16"):
        load(folder, dtype="float16")
    with pytest.raises(UsageError, match="bfloat16"):
        load(folder, dtype="bfloat")


def test_bfloat16_stays_as_stored_where_the_processor_computes_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {n: t.bfloat16() for n, t in tiny_tensors(CONFIG).items()}
    folder = write_tiny_checkpoint(tmp_path, tensors=tensors)
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        found = Device("cpu", "processor", computes, False)
        monkeypatch.setattr(devices, "find_cpu", lambda found=found: found)
        model = load(folder).model
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = model(torch.arange(4), PackedCausal([4]))
        assert logits.isfinite().all()


def test_the_record_reads_stops_pad_and_defaults(tmp_path: Path) -> None:
    generation = {"eos_token_id": [IM_END, ENDOFTEXT], "do_sample": True, "top_p": 0.8, "top_k": 20}
    record = load(write_tiny_checkpoint(tmp_path, generation=generation)).record
    assert set(record.stop_token_ids) == {IM_END, ENDOFTEXT}
    assert record.pad_token_id == ENDOFTEXT
    assert record.chat_format == "template"
    assert record.sampling == SamplingParams(top_p=0.8, top_k=20)
    assert (record.vocab_size, record.vocab_rows, record.context_tokens) == (464, 480, 512)


@pytest.mark.parametrize(
    ("generation", "chat_format", "sampling"),
    [
        ({"do_sample": False, "top_p": 0.8}, "raw", SamplingParams(temperature=0.0)),
        ({}, "raw", SamplingParams(temperature=0.0)),
        (
            {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 7},
            "raw",
            SamplingParams(temperature=0.0, repetition_penalty=1.1, max_tokens=7),
        ),
        (
            {"repetition_penalty": 1.1, "max_new_tokens": 7},
            "raw",
            SamplingParams(temperature=0.0, repetition_penalty=1.1, max_tokens=7),
        ),
        (  # the first generation's chat files
            {"chat_format": "chatml", "do_sample": True, "top_p": 0.5, "max_new_tokens": 512},
            "chatml",
            SamplingParams(top_p=0.5, max_tokens=512),
        ),
        ({"chat_format": "raw", "do_sample": True, "top_k": 0}, "raw", SamplingParams()),
    ],
)
def test_sampling_and_format_without_a_template(
    generation: dict[str, Any], chat_format: str, sampling: SamplingParams, tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(tmp_path, generation=generation, template=None)
    record = load(folder).record
    assert record.chat_format == chat_format
    assert record.sampling == sampling


@pytest.mark.parametrize("wrong", ["<|im_end|>", -5, 470, 5000])
def test_a_wrong_token_id_names_file_and_key(wrong: object, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, generation={"eos_token_id": [IM_END, wrong]})
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*eos_token_id"):
        load(folder)


def test_a_family_that_publishes_its_sampling_keeps_it_beside_a_limit(tmp_path: Path) -> None:
    record = load(write_tiny_checkpoint(tmp_path, generation={"max_new_tokens": 7})).record
    expected = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert record.sampling == expected.replace(max_tokens=7)


@pytest.mark.parametrize(
    ("key", "generation"),
    [
        ("top_p", {"do_sample": True, "top_p": 8}),
        ("max_new_tokens", {"max_new_tokens": "x"}),
        ("max_new_tokens", {"max_new_tokens": -1}),
        ("max_new_tokens", {"do_sample": False, "max_new_tokens": 0}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("do_sample", {"do_sample": "yes"}),
    ],
)
def test_wrong_sampling_defaults_name_file_and_key(
    key: str, generation: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(tmp_path, generation=generation)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json\): {key}: [a-z]"):
        load(folder)


def test_the_default_model_stays_quantized_and_mapped(default_model_path: Path) -> None:
    loaded = load(default_model_path)
    weights = [m for m in loaded.model.modules() if isinstance(m, QuantWeight)]
    plain = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert len(weights) == 211  # seven matrices in each of 30 layers, and the tied embedding
    assert sum(w.size_bytes for w in weights) < default_model_path.stat().st_size
    assert plain < 1 << 20  # the norms


# Before the model is loaded everything that computing needs is imported, and is not counted.
_GROWTH = """
import sys
from pathlib import Path
import torch
from qwenkit.kernels import devices
from qwenkit.kernels.devices import Device
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load

def anonymous_bytes():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

before = anonymous_bytes()
loaded = load(Path(sys.argv[1]))
with torch.inference_mode():
    logits = loaded.model(torch.arange(4), PackedCausal([4]))
assert logits.isfinite().all()
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_computing_with_the_default_model_does_not_expand_it(default_model_path: Path) -> None:
    command = [sys.executable, "-c", _GROWTH, str(default_model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 250 * 2**20  # the model in fp32 is 540 MB


def _set_in_config(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))


def test_a_quantization_that_is_no_object_names_the_file(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, config={"quantization_config": "gptq"})
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config: expected an object"):
        load(folder)


def test_a_wrong_config_key_names_the_file(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    _set_in_config(tmp_path, "hidden_size", 33)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'}: num_att")):
        load(tmp_path)
    _set_in_config(tmp_path, "model_type", "gpt_neox")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'}: model_type")):
        load(tmp_path)


def test_a_wrong_tokenizer_key_names_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_random_gguf(path, CONFIG | {"vocab_size": 264}, storage="F32")
    checkpoint = open_checkpoint(path)
    types = [0, *checkpoint.gguf_metadata["tokenizer.ggml.token_type"][1:]]
    metadata = {**checkpoint.gguf_metadata, "tokenizer.ggml.token_type": types}
    damaged = dataclasses.replace(checkpoint, gguf_metadata=metadata)
    field = r": GGUF metadata: tokenizer\.ggml\.token_type\[0\]: got 0"
    with pytest.raises(TokenizerError, match=re.escape(str(path)) + field):
        load_tokenizer(damaged)
    folder = write_tiny_checkpoint(tmp_path / "folder")
    (folder / "qwen.tiktoken").write_text("no base64\n")
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken: line 1") as caught:
        load(folder)
    assert str(caught.value).count(str(folder)) == 1


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    _set_in_config(folder, "num_hidden_layers", 10_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers: got 10000,"):
        load(folder)
