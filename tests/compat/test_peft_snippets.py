"""The published snippets that load and merge an adapter, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adapters_made import write_made_adapter
from qwenkit import AutoModelForCausalLM, AutoPeftModelForCausalLM, AutoTokenizer
from qwenkit.adapter_files import read_adapter
from qwenkit.adapters.lora import merged_weight
from qwenkit.errors import UsageError
from qwenkit.load import load
from tiny import write_tiny_checkpoint

IDS = torch.tensor([[65, 66, 67, 68], [256, 70, 71, 72]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    base = write_tiny_checkpoint(folder / "base", config={"intermediate_size": 64})
    return write_made_adapter(
        folder / "adapter", load(base).model, base_model_name_or_path=str(base)
    )


def test_load_merge_and_save(adapter: Path, tmp_path: Path) -> None:
    base = adapter.parent / "base"
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = AutoPeftModelForCausalLM.from_pretrained(
        adapter, device_map="auto", trust_remote_code=True
    ).eval()
    assert model.llm.adapters == ("default",)
    with torch.no_grad():
        expected = model(IDS, MASK).logits  # [batch, length, vocab_size]
        assert (expected - plain(IDS, MASK).logits).abs().max() > 0.1 * expected.abs().max()
    written = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    assert not torch.equal(
        written, plain.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    )
    merged = model.merge_and_unload()
    with torch.no_grad():
        got = merged(IDS, MASK).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    merged.save_pretrained(tmp_path / "new", max_shard_size="20KB", safe_serialization=True)
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", device_map="cpu")
    assert torch.equal(
        again.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False),
        merged.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False),
    )
    with torch.no_grad():
        assert torch.equal(again(IDS, MASK).logits, got)
    assert AutoTokenizer.from_pretrained(tmp_path / "new").encode("hi") == [104, 105]
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "new" / name).exists()
    old, new = (load(f).model.get_parameter(_Q) for f in (base, tmp_path / "new"))
    pair = read_adapter(adapter).low_ranks[_Q.removesuffix(".weight")]
    assert torch.equal(new, merged_weight(old, pair, torch.float32))
    with pytest.raises(UsageError, match="safe_serialization"):
        merged.save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(UsageError, match="shard size: got 'much'"):
        merged.save_pretrained(tmp_path / "bin", max_shard_size="much")


_Q = "model.layers.0.self_attn.q_proj.weight"


def test_an_adapter_that_names_no_model(adapter: Path, tmp_path: Path) -> None:
    given = json.loads((adapter / "adapter_config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps(given | {"base_model_name_or_path": None}))
    (copy / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(UsageError, match="has no base_model_name_or_path"):
        AutoPeftModelForCausalLM.from_pretrained(copy)
