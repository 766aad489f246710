"""A quantized model as a folder that transformers, GPTQModel, AutoAWQ and vLLM read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenkit import __version__
from qwenkit.checkpoint.safetensors_write import DEFAULT_SHARD_BYTES
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.checkpoint.storages import BLOCKS, PLAIN
from qwenkit.errors import UsageError
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.quantize.anatomy import published_paths
from qwenkit.quantize.layer import MatrixResult
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource
from qwenkit.save import (
    Planned,
    published_config,
    write_json,
    write_model_folder,
    write_same_tokenizer,
)
from qwenkit.stored_weight import PLAIN_STORAGES


def write_result(
    source: LayerSource,
    layers: Mapping[str, StoredTensor],
    results: Sequence[MatrixResult],
    settings: QuantizeSettings,
    folder: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the model with the tensors of its `layers`, and all else as `source` has it.

    Raises as `write_model_folder`.
    """
    dtype = source.stored_dtype
    tensors: dict[str, Planned] = {}
    for name, stored in source.tensors.items():
        if not name.startswith(f"{source.anatomy.layers}."):
            tensors[name] = _planned(name, stored, dtype)
    if source.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # the embedding itself
    for name, stored in layers.items():
        tensors[name] = Planned(stored.shape, PLAIN[stored.storage], stored.read)
    block = quantization_config(settings, results, source)
    config = published_config(source.checkpoint, source.config) | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "quantization_config": block,
    }
    config.pop("dtype", None)
    write_model_folder(
        folder,
        source.checkpoint,
        config,
        tensors,
        tokenizer_files=partial(write_same_tokenizer, source.tokenizer, source.checkpoint),
        shard_bytes=shard_bytes,
    )
    if block["quant_method"] == "gptq":
        write_json(folder / "quantize_config.json", block)
    elif block["quant_method"] == "awq":
        own = {"zero_point": True, "q_group_size": block["group_size"], "w_bit": 4}
        write_json(folder / "quant_config.json", own | {"version": "GEMM"})


def _planned(name: str, stored: StoredTensor, dtype: torch.dtype) -> Planned:
    if stored.storage in PLAIN_STORAGES:
        return Planned(stored.shape, PLAIN[stored.storage], stored.read)
    if stored.storage not in BLOCKS:
        raise UsageError(
            f"{name}: is stored as {stored.storage}; quantize a model whose embedding and head are "
            "plain numbers or blocks of a GGUF."
        )
    return Planned(stored.shape, dtype, _blocks(stored, dtype))


def _blocks(stored: StoredTensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: GgmlWeight(stored.read(), stored.storage).dequantize(dtype)


def quantization_config(
    settings: QuantizeSettings, results: Sequence[MatrixResult], source: LayerSource
) -> dict[str, Any]:
    """What config.json says of the layers, in the words of the format's own programs."""
    kept = _kept(results, source)
    if settings.method in ("nf4", "int8"):
        return _bitsandbytes(settings, kept, source)
    if settings.is_awq_layout:
        return {
            "quant_method": "awq",
            "bits": 4,
            # of whole rows every width is a size of its own, and there is one place for all
            "group_size": -1 if settings.wanted_group == -1 else results[0].group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
        }
    usual = settings.group_size or 128
    if usual != -1 and results:
        sizes = [r.group_size for r in results if r.bits == settings.width]
        usual = max(sizes, default=usual)
    return {
        "quant_method": "gptq",
        "bits": settings.width,
        "group_size": usual,
        "damp_percent": settings.damp,
        "desc_act": settings.act_order,
        "static_groups": False,
        "sym": settings.is_symmetric,
        "true_sequential": True,
        "lm_head": False,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "checkpoint_format": "gptq_v2" if settings.is_v2 else "gptq",
        "meta": {"quantizer": [f"qwenkit:{__version__}"], "method": settings.method},
    } | _exceptions(settings, results, kept, usual)


def _bitsandbytes(
    settings: QuantizeSettings, kept: Sequence[str], source: LayerSource
) -> dict[str, Any]:
    """As a BitsAndBytesConfig is saved."""
    is_nf4 = settings.method == "nf4"
    compute = "float32" if source.stored_dtype is torch.float32 else "bfloat16"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": is_nf4,
        "load_in_8bit": not is_nf4,
        "bnb_4bit_quant_type": "nf4" if is_nf4 else "fp4",  # the default, which means nothing
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": compute if is_nf4 else "float32",
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head", *kept] if kept else None,
    }


def _exceptions(
    settings: QuantizeSettings, results: Sequence[MatrixResult], kept: Sequence[str], usual: int
) -> dict[str, Any]:
    """GPTQModel's and vLLM's word for matrices unlike the others: patterns of paths."""
    dynamic: dict[str, dict[str, int]] = {f"-:{re.escape(path)}$": {} for path in kept}
    for result in results:
        own = {"bits": result.bits} if result.bits != settings.width else {}
        if usual != -1 and result.group_size != usual:
            own["group_size"] = result.group_size
        if own:
            dynamic[f"+:{re.escape(result.path)}$"] = own
    return {"dynamic": dynamic} if dynamic else {}


def _kept(results: Sequence[MatrixResult], source: LayerSource) -> list[str]:
    """The published paths of linear layers that keep their numbers, routers among them."""
    made = {result.path for result in results}
    kept = []
    for number in range(source.layer_count):
        for name, module in source.meta_layer(number).named_modules():
            if isinstance(module, Linear | GroupedLinear):
                own = (f"{source.layer_path(number)}.{p}" for p in published_paths(name, module))
                kept += [path for path in own if path not in made]
    return kept
