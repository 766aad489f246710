"""vLLM on a CPU, eager: bf16, fp32, or int8 weights and activations (W8A8)."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import Options, prompt_ids, unsupported

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_QUANTIZATION = {  # of the compressed-tensors format
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def prepare(source: Path, target: Path, options: Options) -> None:
    """Write the int8 checkpoint: a scale for each output channel, embedding and head in bf16."""
    weights = options.weights
    assert weights is not None
    if weights.name == "int4":
        raise unsupported("vLLM on a CPU", weights)
    target.mkdir(parents=True, exist_ok=True)
    files = importlib.import_module("safetensors.torch")
    tensors: dict[str, Any] = {}
    for name, tensor in files.load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        wide = tensor.float()  # [rows, columns]
        scale = (wide.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)  # [rows, 1]
        tensors[name] = (wide / scale).round().char()  # [rows, columns]
        tensors[f"{name}_scale"] = scale
    files.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _QUANTIZATION
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target)


class Vllm:
    """A folder in the hub's layout, prepared for int8."""

    def __init__(self, model: str, options: Options) -> None:
        vllm = importlib.import_module("vllm")
        self.version = str(vllm.__version__)
        weights = options.weights
        if weights is not None and weights.name == "int4":
            raise unsupported("vLLM on a CPU", weights)
        wide = weights is not None and weights.name == "fp32"
        narrow = weights is not None and weights.name == "int8"
        self.setting = "fp32" if wide else "W8A8, head bf16" if narrow else "bf16"
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model,
            dtype="float32" if wide else "bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=options.most_positions,
            max_num_seqs=options.most_streams,
            max_num_batched_tokens=max(options.most_positions, 2048),
        )
        config = json.loads((Path(model) / "config.json").read_text())
        self._vocab_size = int(config["vocab_size"])

    def _run(self, prompt_tokens: int, tokens: int, streams: int) -> float:
        sampling = self._params(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": prompt_ids(prompt_tokens, self._vocab_size, stream)}
            for stream in range(streams)
        ]
        start_s = time.perf_counter()
        self._llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start_s

    def prefill(self, tokens: int) -> float:
        """A whole request of one token."""
        return self._run(tokens, 1, 1)

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """A request of `tokens` more than one, less a request of one."""
        return self._run(context, tokens + 1, streams) - self._run(context, 1, streams)
