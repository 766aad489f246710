"""Our GGUF files against those that llama.cpp's own quantizer makes of the same model: the same
types, the same bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint.gguf import GgufFile, read_gguf
from qwenkit.checkpoint.imatrix import ColumnSquares, Imatrix
from qwenkit.quantize.gguf_export import export_gguf
from qwenkit.quantize.gguf_scheme import SCHEMES
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

pytestmark = pytest.mark.oracle

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": WIDE | {"num_hidden_layers": 17, "num_key_value_heads": 2},
    "qwen2 tied": WIDE | {"num_hidden_layers": 3, "tie_word_embeddings": True},
    "qwen2 with rows of 288 and 544 numbers": {
        **{"hidden_size": 288, "intermediate_size": 544, "num_attention_heads": 6},
        **{"num_hidden_layers": 9, "num_key_value_heads": 6, "tie_word_embeddings": True},
    },
    "qwen2 with rows of 272 numbers": {"hidden_size": 272, "intermediate_size": 256},
    "qwen2 of 80 layers": {"num_hidden_layers": 80, "intermediate_size": 32},
    "qwen2_moe": WIDE
    | EXPERTS
    | {"num_hidden_layers": 3, "shared_expert_intermediate_size": 512, "mlp_only_layers": [1]},
    "qwen2_moe of 8 experts": WIDE
    | EXPERTS
    | {"num_experts": 8, "num_hidden_layers": 2, "shared_expert_intermediate_size": 256},
    "qwen3": WIDE | {"num_hidden_layers": 3, "head_dim": 64},
    "qwen3_moe": WIDE | EXPERTS | {"num_hidden_layers": 2, "head_dim": 32},
    "llama": WIDE | {"num_hidden_layers": 3},
}
SOME = ("q4_k_m", "q2_k", "iq4_xs", "q4_0")  # for every model; all of them for the first


def _source(folder: Path, name: str) -> Path:
    config = {"vocab_size": 512, "model_type": name.split()[0]} | CONFIGS[name]
    tensors = {n: t * 0.1 for n, t in tiny_tensors(CONFIG | config).items()}
    return write_tiny_checkpoint(folder, config=config, tensors=tensors)


def _imatrix(file: GgufFile) -> Imatrix:
    """One entry for every matrix of a file but the embedding and the head."""
    generator = torch.Generator().manual_seed(4)
    entries = {}
    for name, tensor in file.tensors.items():
        if len(tensor.shape) > 1 and name.startswith("blk."):
            matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = torch.rand(matrices, tensor.shape[-1], generator=generator) ** 3
            entries[name] = ColumnSquares(sums * 7, torch.full((matrices,), 7.0))
    return Imatrix(entries)


class _Quantizer:
    """`llama_model_quantize`."""

    def __init__(self) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        self.api = llama_cpp

    def __call__(
        self, source: Path, target: Path, file_type: int, means: Mapping[str, torch.Tensor]
    ) -> None:
        params = self.api.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.allow_requantize = 1, file_type, True
        kind = self.api.llama_cpp.llama_model_imatrix_data
        rows = (kind * (len(means) + 1))()
        for row, (name, mean) in zip(rows, means.items(), strict=False):
            row.name, row.size = name.encode(), mean.numel()
            row.data = ctypes.cast(mean.data_ptr(), ctypes.POINTER(ctypes.c_float))
        if means:
            params.imatrix = ctypes.cast(rows, ctypes.POINTER(kind))
        done = self.api.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        assert done == 0


@pytest.fixture(scope="module")
def quantizer() -> _Quantizer:
    return _Quantizer()


@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_those_of_llama_quantize(
    name: str, with_imatrix: bool, quantizer: _Quantizer, tmp_path: Path
) -> None:
    source = _source(tmp_path / "model", name)
    whole = tmp_path / "f32.gguf"
    export_gguf(source, whole, "f32")
    imatrix = _imatrix(read_gguf(whole)) if with_imatrix else None
    means = {}
    for entry, squares in ({} if imatrix is None else imatrix.entries).items():
        mean = squares.means(*squares.sums.shape)
        assert mean is not None
        means[entry] = mean.contiguous()
    schemes = (
        SCHEMES if name == "qwen2" and with_imatrix else SOME
    )  # each type without is elsewhere
    for scheme in schemes:
        theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
        quantizer(whole, theirs, SCHEMES[scheme].file_type, means)
        export_gguf(source, ours, scheme, imatrix=imatrix)
        _assert_same(read_gguf(ours), read_gguf(theirs), scheme)


def _assert_same(ours: GgufFile, theirs: GgufFile, scheme: str) -> None:
    mine, other = ours.tensors, theirs.tensors
    assert mine.keys() == other.keys()
    types = {name: tensor.storage for name, tensor in mine.items()}
    assert types == {name: tensor.storage for name, tensor in other.items()}, scheme
    for name, tensor in mine.items():
        assert tensor.shape == other[name].shape, (scheme, name)
        bytes_of = [t.read().reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert torch.equal(*bytes_of), (scheme, name)
    for key in ("general.file_type", "general.quantization_version"):
        if key in ours.metadata:
            assert ours.metadata[key] == theirs.metadata[key]
    left = {k: v for k, v in theirs.metadata.items() if k not in ours.metadata}
    assert set(left) <= {"general.quantization_version"}  # of a file of plain numbers
