"""Room 6½: the names of the published snippets, so that only their import line changes.

    from qwenkit import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Everything here stands on the same loader, renderer and engine as `qwenkit.LLM`.
"""

from __future__ import annotations

from qwenkit.compat.download import snapshot_download
from qwenkit.compat.generation import GenerationConfig
from qwenkit.compat.model import AutoModelForCausalLM, CompatModel, load_model_on_gpus
from qwenkit.compat.peft import AutoPeftModelForCausalLM, CompatPeftModel, MergedModel
from qwenkit.compat.prompts import decode_tokens, get_stop_words_ids, make_context
from qwenkit.compat.quantization import BitsAndBytesConfig
from qwenkit.compat.streamers import TextIteratorStreamer, TextStreamer
from qwenkit.compat.tokenizer import AutoTokenizer, CompatTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "CompatModel",
    "CompatPeftModel",
    "CompatTokenizer",
    "GenerationConfig",
    "MergedModel",
    "TextIteratorStreamer",
    "TextStreamer",
    "decode_tokens",
    "get_stop_words_ids",
    "load_model_on_gpus",
    "make_context",
    "snapshot_download",
]
