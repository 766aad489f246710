"""The board's model: two layers of random numbers behind the real vocabulary."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.bench.random_model import write_random_weights
from qwenkit.errors import MissingDependencyError

VOCABULARY_FILE = "qwen.tiktoken"
CONTEXT_TOKENS = 1024
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardModel:
    """What may differ from one such model to the next; `answer_tokens` is the length of an answer
    of which nothing else is said.
    """

    seed: int = 0
    template: str = TEMPLATE
    context_tokens: int = CONTEXT_TOKENS
    answer_tokens: int = 48

    @property
    def name(self) -> str:
        """Of its folder."""
        key = hashlib.sha256(repr((self, _CONFIG)).encode()).hexdigest()[:8]
        return f"board-{key}"


def board_model(cache: Path, model: BoardModel) -> Path:
    """The folder of the model below `cache`, written if it is not there.

    Raises MissingDependencyError.
    """
    vocabulary = vocabulary_path()
    folder = cache / "random" / model.name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _write(place, vocabulary, model)
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, vocabulary: Path, model: BoardModel) -> None:
    shutil.copy(vocabulary, folder / VOCABULARY_FILE)
    config = _CONFIG | {"max_position_embeddings": model.context_tokens}
    tokenizer = {
        "tokenizer_class": "QWenTokenizer",
        "pad_token": "<|endoftext|>",
        "chat_template": model.template,
    }
    generation = {
        "do_sample": False,
        "eos_token_id": [151_645, 151_643],
        "max_new_tokens": model.answer_tokens,
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_random_weights(folder / "model.safetensors", config, seed=model.seed)
