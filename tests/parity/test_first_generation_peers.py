"""What is saved and converted of the first generation, computed by other engines: llama.cpp reads
the GGUF of its architecture, transformers the Qwen2 folder made of it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from first_generation import write_first_generation
from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.convert import convert_folder
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.save import save_folder, save_gguf
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers")
OFF = {"use_dynamic_ntk": False, "use_logn_attn": False}
IDS = torch.randint(0, 480, (50,), generator=torch.Generator().manual_seed(1))


def _theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None].long()).logits[0]
    return logits


def _ours(path: Path) -> torch.Tensor:
    logits: torch.Tensor = load(path).model(IDS, PackedCausal([len(IDS)]))
    return logits


def _llama_cpp(file: Path) -> torch.Tensor:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python (make oracles)")
    import llama_cpp

    theirs = llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    theirs.eval(IDS.tolist())
    scores = torch.from_numpy(np.array(theirs.scores[: len(IDS)]))  # [50, vocab_size]
    theirs.close()
    return scores


def test_the_golden_model_converted_computes_its_numbers_in_transformers(
    golden_dir: Path, tmp_path: Path
) -> None:
    source = write_first_generation(tmp_path / "source")  # for a tokenizer
    config = json.loads((golden_dir / "qwen1/config.json").read_text()) | OFF
    (source / "config.json").write_text(json.dumps(config))
    shutil.copyfile(golden_dir / "qwen1/model.safetensors", source / "model.safetensors")
    convert_folder(source, tmp_path / "target", "qwen2")
    stored = read_safetensors(golden_dir / "qwen1/reference.safetensors")
    reference = {name: tensor.read() for name, tensor in stored.items()}
    for tokens in (31, 150):
        case = f"full.ntk0.logn0.n{tokens}"
        logits = _theirs(tmp_path / "target", reference["input_ids"][:tokens])
        got, expected = logits[reference[f"{case}.rows"].long()], reference[case]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_llama_cpp_computes_a_saved_first_generation_gguf(tmp_path: Path) -> None:
    source = write_first_generation(tmp_path / "source", config=OFF)
    save_gguf(load(source), tmp_path / "saved.gguf")
    expected = _ours(source)
    got = _llama_cpp(tmp_path / "saved.gguf")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-3, "rope_theta": 1e4}],
    ids=["untied", "tied", "eps"],
)
def test_other_engines_compute_what_is_saved_of_qwen2(
    config: dict[str, Any], tmp_path: Path
) -> None:
    full = CONFIG | {"hidden_size": 64} | config
    source = write_tiny_checkpoint(tmp_path / "source", config=full, tensors=_tensors(full))
    save_folder(load(source), tmp_path / "folder")
    save_gguf(load(source), tmp_path / "saved.gguf")
    expected = _ours(source)
    near = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(_theirs(tmp_path / "folder", IDS), expected, rtol=0, atol=near)
    torch.testing.assert_close(_llama_cpp(tmp_path / "saved.gguf"), expected, rtol=0, atol=near)


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t / 2 if t.ndim > 1 else t for name, t in tiny_tensors(config).items()}
