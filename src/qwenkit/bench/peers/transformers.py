"""transformers in bf16 (fp32 where that is asked for) with its dynamic cache."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.spec import Options, prompt_ids


class Transformers:
    """A folder of the hub's layout, or a GGUF file, which is expanded first."""

    def __init__(self, model: str, options: Options) -> None:
        import torch

        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version = str(transformers.__version__)
        wide = options.weights is not None and options.weights.name == "fp32"
        self.setting = "fp32" if wide else "bf16"
        torch.set_num_threads(options.threads)
        self._torch = torch
        path = Path(model)
        dtype = torch.float32 if wide else torch.bfloat16
        if path.suffix == ".gguf":
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype
            )
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._model = loaded.eval()
        self._vocab_size = int(loaded.config.vocab_size)

    def _forward(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """ids [streams, tokens]; the next ids [streams, 1] and the cache."""
        with self._torch.inference_mode():
            output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    def _prompts(self, tokens: int, streams: int) -> Any:
        rows = [prompt_ids(tokens, self._vocab_size, stream) for stream in range(streams)]
        return self._torch.tensor(rows)

    def prefill(self, tokens: int) -> float:
        """One forward, logits of the last token only."""
        prompts = self._prompts(tokens, 1)
        start_s = time.perf_counter()
        self._forward(prompts, None)
        return time.perf_counter() - start_s

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """Greedy, one token of every stream a forward."""
        ids, cache = self._forward(self._prompts(context, streams), None)
        start_s = time.perf_counter()
        for _ in range(tokens):
            ids, cache = self._forward(ids, cache)
        return time.perf_counter() - start_s
