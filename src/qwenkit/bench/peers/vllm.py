"""vLLM on a CPU, eager: bf16, fp32, W8A8 (int8 weights and activations) or W4A16 (int4 weights)."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import Options, WeightSetting, prompt_ids

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_NIBBLES = 8  # of an int32


def _quantization(weights: WeightSetting) -> dict[str, Any]:
    """What config.json says, in the compressed-tensors format; the head is left as it is."""
    group: dict[str, Any] = {"targets": ["Linear"]}
    if weights.name == "int8":
        group["weights"] = _INT8 | {"strategy": "channel", "dynamic": False}
        group["input_activations"] = _INT8 | {"strategy": "token", "dynamic": True}
    else:
        grouped = {"strategy": "group", "group_size": weights.group_size, "dynamic": False}
        group["weights"] = _INT8 | {"num_bits": 4} | grouped
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if weights.name == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _narrow(name: str, tensor: Any, weights: WeightSetting) -> dict[str, Any]:
    """The tensors in place of one matrix, [rows, columns]; nearest rounding."""
    torch = importlib.import_module("torch")
    wide = tensor.float()  # [rows, columns]
    if weights.name == "int8":
        scale = (wide.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)  # [rows, 1]
        return {name: (wide / scale).round().char(), f"{name}_scale": scale}
    rows, columns = wide.shape
    grouped = wide.view(rows, -1, weights.group_size)  # [rows, groups, group_size]
    scale = (grouped.abs().amax(2) / 7).clamp(min=1e-12)  # [rows, groups]
    levels = (grouped / scale[:, :, None]).round().clamp(-8, 7) + 8  # [rows, groups, group_size]
    nibbles = levels.view(rows, columns // _NIBBLES, _NIBBLES).long()
    shifts = 4 * torch.arange(_NIBBLES)
    packed = (nibbles << shifts).sum(2)  # [rows, columns / 8]
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {
        f"{name}_packed": packed,
        f"{name}_scale": scale.to(tensor.dtype),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def prepare(source: Path, target: Path, options: Options) -> None:
    """Write the int8 checkpoint, a scale for each output channel, or the int4 one, a scale for each
    group of a row; embedding and head stay in bf16.
    """
    weights = options.weights
    assert weights is not None
    target.mkdir(parents=True, exist_ok=True)
    files = importlib.import_module("safetensors.torch")
    tensors: dict[str, Any] = {}
    for name, tensor in files.load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        tensors |= _narrow(name, tensor, weights)
    files.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _quantization(weights)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target)


def setting(weights: WeightSetting | None) -> str:
    """How it holds what is asked for."""
    if weights is None or weights.name == "bf16":
        return "bf16"
    if weights.name == "int4":
        return f"int4 g{weights.group_size}, head bf16"
    return "fp32" if weights.name == "fp32" else "W8A8, head bf16"


class Vllm:
    """A folder in the hub's layout, prepared for int8."""

    def __init__(self, model: str, options: Options) -> None:
        vllm = importlib.import_module("vllm")
        self.version = str(vllm.__version__)
        weights = options.weights
        wide = weights is not None and weights.name == "fp32"
        self.setting = setting(weights)
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
