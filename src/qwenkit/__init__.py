"""qwenkit: the whole life of a Qwen model in one package.

The arrow, left may import what stands to its right: cli > server, web, bench > agent, evals > api >
engine, training, quantize, parallel, survey > load, score > models, formats, checkpoint, adapters,
chat > layers, tokenizer > kernels > types > errors
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenkit.api import LLM as LLM
    from qwenkit.api import AsyncLLM as AsyncLLM
    from qwenkit.compat import AutoModelForCausalLM as AutoModelForCausalLM
    from qwenkit.compat import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from qwenkit.compat import AutoTokenizer as AutoTokenizer
    from qwenkit.compat import BitsAndBytesConfig as BitsAndBytesConfig
    from qwenkit.compat import GenerationConfig as GenerationConfig
    from qwenkit.compat import TextIteratorStreamer as TextIteratorStreamer
    from qwenkit.compat import TextStreamer as TextStreamer
    from qwenkit.compat import decode_tokens as decode_tokens
    from qwenkit.compat import get_stop_words_ids as get_stop_words_ids
    from qwenkit.compat import load_model_on_gpus as load_model_on_gpus
    from qwenkit.compat import make_context as make_context
    from qwenkit.compat import snapshot_download as snapshot_download
    from qwenkit.errors import QwenkitError as QwenkitError
    from qwenkit.types.messages import Message as Message
    from qwenkit.types.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "qwenkit.api",
    "AsyncLLM": "qwenkit.api",
    "AutoModelForCausalLM": "qwenkit.compat",
    "AutoPeftModelForCausalLM": "qwenkit.compat",
    "AutoTokenizer": "qwenkit.compat",
    "BitsAndBytesConfig": "qwenkit.compat",
    "GenerationConfig": "qwenkit.compat",
    "TextIteratorStreamer": "qwenkit.compat",
    "TextStreamer": "qwenkit.compat",
    "decode_tokens": "qwenkit.compat",
    "get_stop_words_ids": "qwenkit.compat",
    "load_model_on_gpus": "qwenkit.compat",
    "make_context": "qwenkit.compat",
    "snapshot_download": "qwenkit.compat",
    "QwenkitError": "qwenkit.errors",
    "Message": "qwenkit.types.messages",
    "SamplingParams": "qwenkit.types.sampling",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # imported on first use, so that the package itself stays light
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'qwenkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
