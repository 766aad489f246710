"""The board's model: two layers of random numbers behind the real vocabulary."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qwenkit.bench.random_model import write_random_weights
from qwenkit.errors import MissingDependencyError

VOCABULARY_FILE = "qwen.tiktoken"
CONTEXT_TOKENS = 1024
DEFAULT_ANSWER_TOKENS = 48  # of a request that does not say how many
LOGITS = 151_936  # a row of the head; the last ones stand for no token
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": LOGITS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151_645,
}


def vocabulary_path() -> Path:
    """The original vocabulary, which the package dashscope carries; the package is not imported.

    Raises MissingDependencyError.
    """
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "resources" / VOCABULARY_FILE
        if path.is_file():
            return path
    raise MissingDependencyError("dashscope", "bench-serve", "the board's model")


def board_model(cache: Path, *, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """The folder of the model below `cache`, written if it is not there; None: no template.

    Raises MissingDependencyError.
    """
    vocabulary = vocabulary_path()
    name = f"board-{seed}" if template == TEMPLATE else f"board-{seed}-{_short(template)}"
    folder = cache / "random" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _write(place, vocabulary, seed, template)
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, vocabulary: Path, seed: int, template: str | None) -> None:
    shutil.copy(vocabulary, folder / VOCABULARY_FILE)
    tokenizer = {"tokenizer_class": "QWenTokenizer", "pad_token": "<|endoftext|>"}
    if template is not None:
        tokenizer["chat_template"] = template
    generation = {
        "do_sample": False,
        "eos_token_id": [151_645, 151_643],
        "max_new_tokens": DEFAULT_ANSWER_TOKENS,
    }
    files = {
        "config.json": _CONFIG,
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_random_weights(folder / "model.safetensors", _CONFIG, seed=seed)


def _short(template: str | None) -> str:
    return "plain" if template is None else hashlib.sha256(template.encode()).hexdigest()[:12]
