"""transformers in bf16 (fp32 where that is asked for) with its dynamic cache."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from qwenkit.bench.peers.playing import play_in_batches
from qwenkit.bench.peers.spec import Load, Options, prompt_ids


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
        self._streams = options.most_streams

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

    def play(self, load: Load) -> list[list[float]]:
        """Greedy, in batches padded on the left, of as many as it is made for and are there."""
        batch = _Batch(self._model, self._torch)
        return play_in_batches(
            load, batch.begin, batch.advance, most=self._streams, vocab_size=self._vocab_size
        )


class _Batch:
    """Prompts of different lengths that go on together, one token of each a forward."""

    def __init__(self, model: Any, torch: Any) -> None:
        self._model, self._torch = model, torch
        self._ids: Any = None
        self._mask: Any = None
        self._cache: Any = None

    def begin(self, prompts: list[list[int]]) -> None:
        """The first token of each; what was before is forgotten."""
        longest = max(len(ids) for ids in prompts)
        pads = [longest - len(ids) for ids in prompts]
        rows = [[0] * pad + ids for pad, ids in zip(pads, prompts, strict=True)]
        seen = [[0] * pad + [1] * (longest - pad) for pad in pads]
        self._cache, self._mask = None, self._torch.tensor(seen)  # [streams, longest]
        self._forward(self._torch.tensor(rows))

    def advance(self) -> None:
        """The next token of each."""
        self._mask = self._torch.cat((self._mask, self._torch.ones_like(self._mask[:, :1])), 1)
        self._forward(self._ids)

    def _forward(self, ids: Any) -> None:
        """ids [streams, tokens], the last ones of those that the mask has."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._torch.inference_mode():
            output = self._model(
                ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._ids = output.logits[:, -1].argmax(-1, keepdim=True)  # [streams, 1]
        self._cache = output.past_key_values
