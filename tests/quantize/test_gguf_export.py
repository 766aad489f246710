"""GGUF export: what comes out opens, chats and holds what each tensor is quantized to by itself."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import DENSE, write_quantized
from quantized_made import EXPERTS as EXPERTS_MADE
from qwenkit.api import LLM
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.imatrix import ColumnSquares, Imatrix
from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.formats.ggml_quantize import quantize_blocks
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import load
from qwenkit.models.published import gguf_layout, gguf_tensors
from qwenkit.models.spec import find
from qwenkit.quantize.gguf_export import export_gguf
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.save import save_gguf
from tiny import CONFIG, ENDOFTEXT, IM_END, tiny_tensors, write_tiny_checkpoint

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 256, "mlp_only_layers": [1]},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "llama": {},  # its queries and keys have another order of rows in a GGUF
    "baichuan": {"max_position_embeddings": None, "model_max_length": 64, "z_loss_weight": 0},
}
IDS = torch.randint(0, 460, (30,), generator=torch.Generator().manual_seed(3))


def _source(folder: Path, name: str = "qwen2", **change: Any) -> Path:
    config = WIDE | {"model_type": name.split()[0]} | CONFIGS[name] | change
    return write_tiny_checkpoint(folder, config=config)


def _expected(source: Path) -> dict[str, torch.Tensor]:
    loaded = load(source, dtype="float32")
    tensors = gguf_tensors(loaded.model, find(loaded.record.model_type))
    return {named.name: named.tensor.reshape(named.shape) for named in tensors}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", ["q4_k_m", "q8_0", "bf16"])
def test_every_tensor_is_what_it_is_quantized_to_by_itself(
    name: str, scheme: str, tmp_path: Path
) -> None:
    source, told = _source(tmp_path / "model", name), []
    done = export_gguf(source, tmp_path / "m.gguf", scheme, progress=told.append)
    assert told[-1] == pytest.approx(1)
    assert told == sorted(told)
    tensors = open_checkpoint(tmp_path / "m.gguf").tensors
    for tensor, numbers in _expected(source).items():
        stored = tensors[tensor]
        if stored.storage in ("F32", "BF16", "F16"):
            assert torch.equal(stored.read(), numbers.to(stored.read().dtype)), tensor
        else:
            rows = numbers.reshape(-1, numbers.shape[-1])
            blocks = quantize_blocks(rows, stored.storage)
            assert torch.equal(stored.read().reshape(len(rows), -1), blocks), tensor
    assert sum(done.storages.values()) == len(_expected(source))


@pytest.mark.parametrize("scheme", ["q8_0", "f16"])
def test_a_model_is_used_as_its_source(scheme: str, tmp_path: Path) -> None:
    generation = {"eos_token_id": [IM_END, ENDOFTEXT], "temperature": 0.6, "top_k": 20}
    source = write_tiny_checkpoint(tmp_path / "model", config=WIDE, generation=generation)
    export_gguf(source, tmp_path / "m.gguf", scheme)
    one, two = load(source), load(tmp_path / "m.gguf")
    assert two.record.stop_token_ids == one.record.stop_token_ids
    assert two.record.sampling.temperature == pytest.approx(0.6)
    assert two.record.sampling.top_k == 20
    assert two.record.context_tokens == one.record.context_tokens
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    with LLM(source) as first, LLM(tmp_path / "m.gguf") as second:
        assert first.render(messages).ids == second.render(messages).ids
    ours, theirs = (x.model(IDS, PackedCausal([30])) for x in (one, two))
    error = (ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt()
    assert error < (0.1 if scheme == "q8_0" else 0.01)


def test_plain_files_are_those_of_save_gguf(tmp_path: Path) -> None:
    source = _source(tmp_path / "model")
    export_gguf(source, tmp_path / "a.gguf", "f16")
    save_gguf(load(source), tmp_path / "b.gguf", storage="F16")
    one, two = (open_checkpoint(tmp_path / f"{n}.gguf") for n in "ab")
    assert {n: t.storage for n, t in one.tensors.items()} == {
        n: t.storage for n, t in two.tensors.items()
    }
    assert all(torch.equal(t.read(), two.tensors[n].read()) for n, t in one.tensors.items())
    own = {"general.file_type": 1}
    assert one.gguf_metadata == {**two.gguf_metadata, **own}


def test_blocks_of_the_wanted_type_pass_as_they_are(tmp_path: Path) -> None:
    config = CONFIG | WIDE | {"vocab_size": 300}
    write_random_gguf(tmp_path / "a.gguf", config, storage="Q8_0")
    done = export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    one, two = (open_checkpoint(tmp_path / f"{n}.gguf").tensors for n in "ab")
    assert all(torch.equal(t.read(), two[n].read()) for n, t in one.items())
    assert done.requantized == ()
    again = export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", "q4_0")
    assert "blk.0.attn_q.weight" in again.requantized
    plain = export_gguf(tmp_path / "b.gguf", tmp_path / "d.gguf", "bf16")
    assert plain.requantized == ()


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("config", [DENSE, EXPERTS_MADE], ids=["dense", "experts"])
def test_a_quantized_folder_becomes_a_gguf(
    method: str, config: dict[str, Any], tmp_path: Path
) -> None:
    settings = QuantizeSettings(method=method, group_size=32)
    _, folder, _ = write_quantized(tmp_path, settings, config=config)
    done = export_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert len(done.requantized) > 10
    tensors = open_checkpoint(tmp_path / "m.gguf").tensors
    model = load(folder, dtype="float32").model
    for slot in gguf_layout(model, find(str(open_checkpoint(folder).config["model_type"]))):
        if tensors[slot.name].storage == "Q8_0":
            value = getattr(model.get_submodule(slot.path), slot.part)
            plain = value.dequantize(torch.float32) if isinstance(value, QuantWeight) else value
            blocks = quantize_blocks(plain.float(), "Q8_0")
            assert torch.equal(tensors[slot.name].read().reshape(len(blocks), -1), blocks)


def test_importances_reach_their_matrices(tmp_path: Path) -> None:
    source = _source(tmp_path / "model", "qwen2_moe")
    down, gate = "blk.0.ffn_down_exps.weight", "blk.1.ffn_gate.weight"
    generator = torch.Generator().manual_seed(1)
    sums = {
        down: torch.rand(3, 256, generator=generator),
        gate: torch.rand(1, 64, generator=generator),
    }
    entries = {n: ColumnSquares(s, torch.ones(len(s)) * 2) for n, s in sums.items()}
    imatrix = Imatrix(entries, datasets=("a.txt",), chunks=3)
    done = export_gguf(
        source, tmp_path / "m.gguf", "q5_0", imatrix=imatrix, imatrix_file="some/where/i.gguf"
    )
    assert down not in done.without_importance
    assert "blk.0.attn_q.weight" in done.without_importance
    assert "token_embd.weight" not in done.without_importance
    checkpoint, expected = open_checkpoint(tmp_path / "m.gguf"), _expected(source)
    for name in (down, gate):
        stored = checkpoint.tensors[name]
        numbers = expected[name].reshape(len(sums[name]), -1, expected[name].shape[-1])
        blocks = [
            quantize_blocks(n, stored.storage, s / 2)
            for n, s in zip(numbers, sums[name], strict=True)
        ]
        assert torch.equal(stored.read().reshape(-1, blocks[0].shape[1]), torch.cat(blocks))
    told = {k: v for k, v in checkpoint.gguf_metadata.items() if k.startswith("quantize.")}
    assert told == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "a.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 3,
    }


def test_an_importance_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    source = _source(tmp_path / "model")
    wrong = Imatrix({"blk.0.attn_q.weight": ColumnSquares(torch.ones(1, 32), torch.ones(1))})
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q\.weight has 32 columns there, here 64"):
        export_gguf(source, tmp_path / "m.gguf", "q4_0", imatrix=wrong)
    other = Imatrix({"blk.0.attn_qkv.weight": ColumnSquares(torch.ones(1, 64), torch.ones(1))})
    with pytest.raises(UsageError, match=r"none of its entries \(blk\.0\.attn_qkv"):
        export_gguf(source, tmp_path / "m.gguf", "q4_0", imatrix=other)
    assert not (tmp_path / "m.gguf").exists()


def test_what_a_gguf_says_of_itself_goes_along(tmp_path: Path) -> None:
    save_gguf(load(_source(tmp_path / "model")), tmp_path / "a.gguf")
    loaded = load(tmp_path / "a.gguf")
    said = {"general.basename": "Qwen2", "general.size_label": "0.5B", "general.quantized_by": "x"}
    metadata = {**loaded.checkpoint.gguf_metadata, **said}
    checkpoint = dataclasses.replace(loaded.checkpoint, gguf_metadata=metadata)
    save_gguf(dataclasses.replace(loaded, checkpoint=checkpoint), tmp_path / "b.gguf")
    export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", "q8_0")
    again = open_checkpoint(tmp_path / "c.gguf").gguf_metadata
    assert again["general.basename"] == "Qwen2"
    assert again["general.size_label"] == "0.5B"
    assert again["general.file_type"] == 7
    assert "general.quantized_by" not in again


def test_damage_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    tensors = tiny_tensors(CONFIG | WIDE)
    bad, target = "model.layers.1.mlp.up_proj.weight", tmp_path / "m.gguf"
    tensors[bad][3, 5] = float("nan")
    source = write_tiny_checkpoint(tmp_path / "nan", config=WIDE, tensors=tensors)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(source, target, "q4_0")
    tensors[bad][3, 5] = 1e9
    source = write_tiny_checkpoint(tmp_path / "large", config=WIDE, tensors=tensors)
    for scheme, message in (("q4_0", "Q4_0 cannot hold"), ("f16", "too large for F16")):
        with pytest.raises(NonFiniteError, match=rf"blk\.1\.ffn_up\.weight: .*{message}"):
            export_gguf(source, target, scheme)
    tensors["model.layers.7.extra.weight"] = torch.ones(3)
    source = write_tiny_checkpoint(tmp_path / "more", config=WIDE, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"part of the model: model\.layers\.7\.extra"):
        export_gguf(source, target, "bf16")
    del tensors["model.layers.7.extra.weight"], tensors["model.norm.weight"]
    source = write_tiny_checkpoint(tmp_path / "less", config=WIDE, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is missing"):
        export_gguf(source, target, "bf16")
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors(CONFIG | WIDE)
    tied = {**WIDE, "tie_word_embeddings": True}
    source = write_tiny_checkpoint(tmp_path / "a", config=tied, tensors=tensors)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        export_gguf(source, tmp_path / "m.gguf", "q8_0")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = write_tiny_checkpoint(tmp_path / "b", config=tied, tensors=tensors)
    export_gguf(source, tmp_path / "m.gguf", "q8_0")
    assert "output.weight" not in open_checkpoint(tmp_path / "m.gguf").tensors


def test_a_tied_head_is_written_where_llama_cpp_wants_one(tmp_path: Path) -> None:
    source = _source(tmp_path / "model", "qwen2_moe", tie_word_embeddings=True)
    export_gguf(source, tmp_path / "m.gguf", "q8_0")
    tensors = open_checkpoint(tmp_path / "m.gguf").tensors
    assert torch.equal(tensors["output.weight"].read(), tensors["token_embd.weight"].read())
    save_gguf(load(source), tmp_path / "n.gguf")
    one, two = load(source), load(tmp_path / "n.gguf")
    ours, theirs = (x.model(IDS, PackedCausal([30])) for x in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_torch_has_its_threads_again_afterwards(tmp_path: Path) -> None:
    source, before = _source(tmp_path / "model"), torch.get_num_threads()
    export_gguf(source, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(CheckpointError, match="write"):
        export_gguf(source, tmp_path / "gone" / "m.gguf", "q8_0")
    assert torch.get_num_threads() == before


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Eight layers of 8 MiB in fp32 pass through less than three of them."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 2304, "num_hidden_layers": 8}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randn(t.shape, generator=generator) for n, t in tiny_tensors(config).items()
    }
    source = write_tiny_checkpoint(tmp_path / "model", config=config, tensors=tensors)
    del tensors
    export_gguf(source, tmp_path / "m.gguf", "q8_0")  # whatever is made once is made
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_gguf(source, tmp_path / "n.gguf", "q8_0")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * 1024  # KiB
