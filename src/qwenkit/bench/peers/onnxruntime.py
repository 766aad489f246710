"""ONNX Runtime GenAI: files from its own model builder, driven token by token."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import Options, prompt_ids, unsupported

_BLOCK_SIZES = (16, 32, 64, 128, 256)


def prepare(source: Path, target: Path, options: Options) -> None:
    """Build the ONNX files of a folder in the hub's layout.

    Activations are quantized to int8 where weights are integers (accuracy level 4), the head is
    held as the other matrices are and computed for the last token only.
    """
    weights = options.weights
    assert weights is not None
    if weights.name == "bf16":
        raise unsupported("ONNX Runtime on a CPU", weights)
    extra = ["prune_lm_head=true", "shared_embeddings=true"]
    if weights.name == "fp32":
        extra = extra[:1]
    else:
        size = weights.group_size
        if size not in _BLOCK_SIZES:
            raise unsupported("ONNX Runtime", weights)
        extra += ["accuracy_level=4", f"block_size={size}", f"matmul_block_size={size}"]
        if weights.name == "int4" and weights.head == "int8":
            extra += ["algo_config=rtn_last"]
            extra.remove("shared_embeddings=true")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(source), "-o", str(target), "-p", weights.name, "-e", "cpu"]
        command += ["-c", cache, "--extra_options", *extra]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the model builder failed"])[-1])


class OnnxRuntime:
    """A folder made by `prepare`."""

    def __init__(self, model: str, options: Options) -> None:
        genai = importlib.import_module("onnxruntime_genai")
        runtime = importlib.import_module("onnxruntime")
        self.version = f"{genai.__version__}/{runtime.__version__}"
        self.setting = "" if options.weights is None else options.weights.label
        self._genai = genai
        config = genai.Config(model)
        session = {"session_options": {"intra_op_num_threads": options.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = genai.Model(config)
        settings = json.loads((Path(model) / "genai_config.json").read_text())
        self._vocab_size = int(settings["model"]["vocab_size"])

    def _start(self, tokens: int, streams: int, positions: int) -> Any:
        """A generator that has read its prompts and chosen one token of each."""
        import numpy

        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=positions, min_length=positions, batch_size=streams, do_sample=False
        )
        generator = self._genai.Generator(self._model, params)
        rows = [prompt_ids(tokens, self._vocab_size, stream) for stream in range(streams)]
        ids = numpy.array(rows, dtype=numpy.int32)
        generator.append_tokens(ids if streams > 1 else ids[0])
        generator.generate_next_token()
        return generator

    def prefill(self, tokens: int) -> float:
        """Reading the prompt and choosing a token, the making of the generator included."""
        start_s = time.perf_counter()
        self._start(tokens, 1, tokens + 1)
        return time.perf_counter() - start_s

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """Greedy, one token of every stream a call."""
        generator = self._start(context, streams, context + tokens + 1)
        start_s = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return time.perf_counter() - start_s
