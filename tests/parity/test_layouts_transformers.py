"""Quantized folders in transformers, on a processor where it reads them there: the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantized_files import LAYOUTS, write_quantized
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(3))
# Not among these: zero points and W8A8 of compressed-tensors, whose tensors transformers 5.23
# expects in other shapes than the package itself writes; GPTQ, AWQ and FP8, which need more than a
# processor.
NEEDS = {
    "nf4": "bitsandbytes",
    "nf4 twice": "bitsandbytes",
    "fp4": "bitsandbytes",
    "llm.int8": "bitsandbytes",
    "w4a16": "compressed_tensors",
}


@pytest.mark.parametrize("name", NEEDS)
def test_logits_are_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[name])
    written = write_quantized(tmp_path, LAYOUTS[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, device_map="cpu"
    )
    with torch.inference_mode():
        expected = theirs(IDS[None]).logits[0]
        ours = load(written.folder).model(IDS, PackedCausal([len(IDS)]))
    largest = expected.abs().max()
    # bitsandbytes multiplies four bits in bf16 on a processor, and rounds activations to eight bits
    # for LLM.int8.
    limit = 1e-4 if name.startswith("w") else 0.02
    assert (ours - expected).abs().max() <= limit * largest
