"""llama.cpp through llama-cpp-python's low-level `llama_decode`."""

from __future__ import annotations

import importlib
import time
from typing import Any

from qwenkit.bench.peers.playing import play_in_slots
from qwenkit.bench.peers.spec import Load, Options, prompt_ids

_MICRO_BATCH_TOKENS = 512  # llama.cpp's own default


class LlamaCpp:
    """A GGUF file; logits of the last token only; a context for each number of streams."""

    def __init__(self, model: str, options: Options) -> None:
        llama = importlib.import_module("llama_cpp")
        self.version = str(llama.__version__)
        self.setting = "the GGUF file"
        self._llama = llama
        self._silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silent, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            model.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp cannot load this model")
        self._threads = options.threads
        self._streams = options.most_streams
        self._batch_tokens = max(options.most_prompt_tokens, options.most_streams)
        self._batch = llama.llama_batch_init(self._batch_tokens, 0, 1)
        vocab = llama.llama_model_get_vocab(self._model)
        self._vocab_size = int(llama.llama_vocab_n_tokens(vocab))
        self._context: Any = None
        self._made_for = (0, 0)

    def _prepare(self, streams: int, positions: int) -> None:
        """An empty context of that many sequences and positions in each."""
        llama = self._llama
        if self._made_for != (streams, positions):
            if self._context:
                llama.llama_free(self._context)
            params = llama.llama_context_default_params()
            params.n_ctx, params.n_batch = streams * positions, self._batch_tokens
            params.n_ubatch = min(self._batch_tokens, _MICRO_BATCH_TOKENS)
            params.n_seq_max = streams
            params.n_threads = params.n_threads_batch = self._threads
            self._context = llama.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp made no context of {streams} × {positions} tokens")
            self._made_for = (streams, positions)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def _submit(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (id, position, sequence, wanted); the most likely next id where wanted."""
        import numpy

        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token_id, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token_id, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(entries)} tokens gave {status}")
        chosen = []
        for i, entry in enumerate(entries):
            if entry[3]:
                logits = self._llama.llama_get_logits_ith(self._context, i)
                if not logits:
                    raise RuntimeError("llama.cpp gave no logits")
                row = numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,))
                chosen.append(int(row.argmax()))
        return chosen

    def _read_prompt(self, tokens: int, stream: int) -> int:
        ids = prompt_ids(tokens, self._vocab_size, stream)
        chosen: list[int] = []
        for first in range(0, tokens, self._batch_tokens):
            part = range(first, min(first + self._batch_tokens, tokens))
            chosen = self._submit([(ids[i], i, stream, i == tokens - 1) for i in part])
        return chosen[0]

    def prefill(self, tokens: int) -> float:
        """One call for the whole prompt."""
        self._prepare(1, tokens)
        start_s = time.perf_counter()
        self._read_prompt(tokens, 0)
        return time.perf_counter() - start_s

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """Greedy, one token of every stream a call."""
        self._prepare(streams, context + tokens)
        chosen = [self._read_prompt(context, stream) for stream in range(streams)]
        start_s = time.perf_counter()
        for step in range(tokens):
            chosen = self._submit([(t, context + step, s, True) for s, t in enumerate(chosen)])
        return time.perf_counter() - start_s

    def play(self, load: Load) -> list[list[float]]:
        """Greedy, in as many slots as it is made for; prompts beside decodes, as in its server."""
        self._prepare(self._streams, load.most_positions)
        memory = self._llama.llama_get_memory(self._context)
        return play_in_slots(
            load,
            self._submit,
            lambda slot: self._llama.llama_memory_seq_rm(memory, slot, -1, -1),
            slots=min(self._streams, load.at_most or self._streams),
            step_tokens=min(self._batch_tokens, _MICRO_BATCH_TOKENS),
            vocab_size=self._vocab_size,
        )
