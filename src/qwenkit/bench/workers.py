r"""One engine in a process of its own, told over standard input what to measure.

    python workers.py llama.cpp MODEL --threads 2 \
        --settings '{"prompt_tokens": 512, "decode_tokens": 48}'

A request is a line of JSON, {"measure": "prefill", "tokens": 512} or {"measure": "decode",
"tokens": 48}; the answer is a line {"seconds": …, "peak_bytes": …}. Separate processes keep one
engine's threads and memory out of the other's figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PROMPT_TOKENS = 8  # before a decode measurement
_FIRST_ID = 1000  # past bytes and control tokens, in a vocabulary that is large enough


def prompt_ids(tokens: int, vocab_size: int) -> list[int]:
    """`tokens` ids below `vocab_size`, round and round from an ordinary one."""
    return [(_FIRST_ID + i) % vocab_size for i in range(tokens)]


class Engine(Protocol):
    """What is measured: seconds for a prompt of `tokens`, and for `tokens` decoded one by one.

    `settings` of an engine name the most that will be asked: "prompt_tokens", "decode_tokens".
    """

    version: str

    def prefill(self, tokens: int) -> float: ...
    def decode(self, tokens: int) -> float: ...


class Qwenkit:
    """This package, through the door its users take."""

    def __init__(self, model: str, threads: int, settings: dict[str, Any]) -> None:
        import qwenkit
        from qwenkit import LLM, SamplingParams

        self.version = qwenkit.__version__
        self._params = SamplingParams
        self._llm = LLM(model, threads=threads, compute=settings.get("compute", "auto"))
        self._vocab_size = self._llm.tokenizer.vocab_size

    def _run(self, prompt_tokens: int, tokens: int) -> Any:
        sampling = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)
        prompt = prompt_ids(prompt_tokens, self._vocab_size)
        return self._llm.generate([prompt], sampling)[0].timing

    def prefill(self, tokens: int) -> float:
        """Until the first token is there."""
        return float(self._run(tokens, 1).first_token_s)

    def decode(self, tokens: int) -> float:
        """From the first token to the last."""
        timing = self._run(PROMPT_TOKENS, tokens + 1)
        return float(timing.total_s - timing.first_token_s)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level `llama_decode`, logits of the last token."""

    def __init__(self, model: str, threads: int, settings: dict[str, Any]) -> None:
        llama = importlib.import_module("llama_cpp")
        self.version = str(llama.__version__)
        self._llama = llama
        llama.llama_log_set(_SILENT(llama), None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            model.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp cannot load this model")
        longest = max(settings["prompt_tokens"], PROMPT_TOKENS)
        positions = max(longest, PROMPT_TOKENS + settings["decode_tokens"])
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, longest, min(longest, 512)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context of {positions} tokens")
        self._batch = llama.llama_batch_init(longest, 0, 1)
        vocab = llama.llama_model_get_vocab(self._model)
        self._vocab_size = int(llama.llama_vocab_n_tokens(vocab))

    def _submit(self, ids: list[int], start: int) -> int:
        """Decode ids at positions from `start` on; the most likely next id."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token_id in enumerate(ids):
            batch.token[i], batch.pos[i] = token_id, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens at {start} gave {status}")
        logits = self._llama.llama_get_logits_ith(self._context, len(ids) - 1)
        if not logits:
            raise RuntimeError("llama.cpp gave no logits")
        import numpy

        return int(numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def prefill(self, tokens: int) -> float:
        """One call for the whole prompt."""
        self._clear()
        prompt = prompt_ids(tokens, self._vocab_size)
        start_s = time.perf_counter()
        self._submit(prompt, 0)
        return time.perf_counter() - start_s

    def decode(self, tokens: int) -> float:
        """Greedy, one token a call."""
        self._clear()
        token_id = self._submit(prompt_ids(PROMPT_TOKENS, self._vocab_size), 0)
        start_s = time.perf_counter()
        for i in range(tokens):
            token_id = self._submit([token_id], PROMPT_TOKENS + i)
        return time.perf_counter() - start_s


def _SILENT(llama: Any) -> Any:
    callback = llama.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(callback)  # ctypes callbacks must outlive their use
    return callback


_KEPT: list[Any] = []


class Transformers:
    """transformers in bf16 with its dynamic cache; a GGUF file is expanded to bf16 first."""

    def __init__(self, model: str, threads: int, settings: dict[str, Any]) -> None:
        import torch

        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version = str(transformers.__version__)
        torch.set_num_threads(threads)
        self._torch = torch
        path = Path(model)
        if settings.get("config"):  # random weights: expanding a file of them would only cost time
            config = transformers.AutoConfig.for_model(**settings["config"])
            loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        elif path.suffix == ".gguf":
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.bfloat16
            )
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model = loaded.eval()
        self._vocab_size = int(loaded.config.vocab_size)

    def _forward(self, ids: list[int], cache: Any) -> tuple[int, Any]:
        with self._torch.inference_mode():
            output = self._model(
                self._torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return int(output.logits[0, -1].argmax()), output.past_key_values

    def prefill(self, tokens: int) -> float:
        """One forward, logits of the last token only."""
        prompt = prompt_ids(tokens, self._vocab_size)
        start_s = time.perf_counter()
        self._forward(prompt, None)
        return time.perf_counter() - start_s

    def decode(self, tokens: int) -> float:
        """Greedy, one token a forward."""
        prompt = prompt_ids(PROMPT_TOKENS, self._vocab_size)
        token_id, cache = self._forward(prompt, None)
        start_s = time.perf_counter()
        for _ in range(tokens):
            token_id, cache = self._forward([token_id], cache)
        return time.perf_counter() - start_s


ENGINES: dict[str, Callable[[str, int, dict[str, Any]], Engine]] = {
    "qwenkit": Qwenkit,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def peak_bytes() -> int:
    """The most memory this process had resident, mapped files included (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else 0


def serve(engine: Engine) -> None:
    """Answer requests until standard input ends."""
    measures = {"prefill": engine.prefill, "decode": engine.decode}
    _answer({"version": engine.version})
    for line in sys.stdin:
        request = json.loads(line)
        seconds = measures[request["measure"]](request["tokens"])
        _answer({"seconds": seconds, "peak_bytes": peak_bytes()})


def _answer(message: dict[str, Any]) -> None:
    # Standard output is this process's line to the bench that started it: a protocol, no message.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    arguments = parser.parse_args()
    serve(ENGINES[arguments.engine](arguments.model, arguments.threads, arguments.settings))
