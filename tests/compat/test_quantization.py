"""`BitsAndBytesConfig` as the published cards have it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantized_files import LAYOUTS, SIZES, write_quantized
from qwenkit import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from qwenkit.errors import UsageError
from qwenkit.formats.bnb4 import Bnb4Weight
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.formats.packed import PackedWeight
from qwenkit.kernels.cpu import bind
from qwenkit.layers.weight import QuantWeight
from tiny import CONFIG, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), config=CONFIG | SIZES)


def matrices(model: Any) -> dict[str, Any]:
    return {
        path: module.weight
        for path, module in model.llm.model.named_modules()
        if hasattr(module, "weight") and path.endswith(("_proj", "lm_head", "embed_tokens"))
    }


def test_four_bits_as_the_card_has_them(folder: Path) -> None:
    bind.register()
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="cpu",
        quantization_config=quantization_config,
        max_memory={},
        trust_remote_code=True,
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    response, _ = model.chat(tokenizer, "hello", history=None, max_new_tokens=3)
    assert isinstance(response, str)
    stored = matrices(plain)
    for path, weight in matrices(model).items():
        assert isinstance(weight, PackedWeight)
        original = stored[path].dequantize(torch.float32)
        if path.endswith("_proj"):
            assert weight.storage == "NF4"
            original = Bnb4Weight.quantize(original, "nf4").dequantize(torch.float32)
        assert torch.equal(weight.dequantize(torch.float32), original)


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        ({"load_in_8bit": True}, "LLM_INT8"),
        ({"load_in_4bit": True}, "FP4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "FP4"),
    ],
)
def test_other_ways(folder: Path, given: dict[str, Any], storage: str) -> None:
    config = BitsAndBytesConfig(**given)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    stored = matrices(AutoModelForCausalLM.from_pretrained(folder))
    for path, weight in matrices(model).items():
        if not path.endswith("_proj"):
            continue
        assert isinstance(weight, QuantWeight)
        assert weight.storage == storage
        plain = stored[path].dequantize(torch.float32)
        nested = config.bnb_4bit_use_double_quant
        made: QuantWeight = LlmInt8Weight.quantize(plain)
        if storage == "FP4":
            made = Bnb4Weight.quantize(plain, "fp4", nested=nested)
        assert torch.equal(weight.dequantize(torch.float32), made.dequantize(torch.float32))
        assert ("weight.nested_absmax" in weight.to_tensors()) == nested


def test_the_older_switches_and_other_classes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    assert {w.storage for p, w in matrices(model).items() if p.endswith("_proj")} == {"LLM_INT8"}
    fields = {"quant_method": SimpleNamespace(value="bitsandbytes"), "load_in_4bit": True}
    theirs = SimpleNamespace(to_dict=lambda: fields | {"bnb_4bit_quant_type": "nf4"})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=theirs)
    assert {w.storage for p, w in matrices(model).items() if p.endswith("_proj")} == {"NF4"}


def test_what_is_quantized_already_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = write_quantized(tmp_path, LAYOUTS["gptq 4 sym"])
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(written.folder, load_in_4bit=True)
    assert "is gptq already and stays so" in caplog.text
    assert {w.storage for p, w in matrices(model).items() if p.endswith("_proj")} == {"GPTQ4"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "set one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "set one of"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type: got 'nf5'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]}, "llm_int8_skip_modules"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BitsAndBytesConfig(**given)


def test_what_is_no_such_config_is_refused(folder: Path) -> None:
    for wrong in ("nf4", {"bits": 4}, SimpleNamespace(to_dict=lambda: {"quant_method": "gptq"})):
        with pytest.raises(UsageError, match="quantization_config: got"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=wrong)
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UsageError, match="say it in quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, load_in_8bit=True)
