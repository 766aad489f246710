"""What the doctor looks at: everything of a checkpoint that can be read, and why the rest cannot.

Unlike loading, which stops at the first fault, this goes on: each part is read by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.members import read_json
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.errors import CheckpointError, ConfigError, QwenkitError, TokenizerError
from qwenkit.load import load_tokenizer
from qwenkit.models.spec import Architecture, ModelConfig, find
from qwenkit.tokenizer import BytePairTokenizer, from_folder

_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, in two languages. A "note" explains what is odd and harmless."""

    kind: str
    severity: Literal["fault", "note"]
    file: str
    english: str
    chinese: str


def fault(kind: str, file: str, english: str, chinese: str) -> Finding:
    return Finding(kind, "fault", file, english, chinese)


def note(kind: str, file: str, english: str, chinese: str) -> Finding:
    return Finding(kind, "note", file, english, chinese)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A checkpoint as far as it can be read.

    `files` are the names in its folder (its own for a single file). `unreadable` says of each JSON
    file that is there why it cannot be read; what could not be read is empty or None elsewhere.
    """

    path: Path
    folder: Path | None
    files: Mapping[str, int]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    opening_error: CheckpointError | None = None
    architecture: Architecture | None = None
    model_config: ModelConfig | None = None
    config_error: ConfigError | None = None
    tokenizer: BytePairTokenizer | None = None
    tokenizer_error: TokenizerError | None = None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def template(self) -> str | None:
        return None if self.checkpoint is None else self.checkpoint.chat_template

    @property
    def is_llm_of_qwen(self) -> bool:
        """Made by Qwen after its first generation, by the config's word."""
        return self.model_type.startswith("qwen") and self.model_type != "qwen"

    def control_id(self, text: object) -> int | None:
        """The id of a control token, given as text or as the object that holds its text."""
        text = text.get("content") if isinstance(text, Mapping) else text
        if self.tokenizer is None or not isinstance(text, str):
            return None
        return self.tokenizer.control_tokens.get(text)


def gather(path: Path) -> Facts:
    """Read what can be read of a model folder or file. Raises ModelNotFoundError."""
    checkpoint, opening_error = None, None
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        opening_error = error
    folder = _folder(path, checkpoint)
    parsed, unreadable = _parse(folder) if folder else ({}, {})
    config = checkpoint.config if checkpoint else parsed.get("config.json", {})
    architecture, model_config, config_error = _understand(config)
    tokenizer, tokenizer_error = _tokenizer(folder, checkpoint)
    indexes = [parsed[name] for name in INDEXES if name in parsed]
    return Facts(
        path=path,
        folder=folder,
        files=dict(_files(folder or path)),
        unreadable=unreadable,
        config=config,
        generation=parsed.get("generation_config.json", {}),
        tokenizer_config=parsed.get("tokenizer_config.json", {}),
        index=indexes[0] if indexes else {},
        checkpoint=checkpoint,
        opening_error=opening_error,
        architecture=architecture,
        model_config=model_config,
        config_error=config_error,
        tokenizer=tokenizer,
        tokenizer_error=tokenizer_error,
    )


def _folder(path: Path, checkpoint: Checkpoint | None) -> Path | None:
    if checkpoint is not None:
        return checkpoint.folder
    return path if path.is_dir() else None


def _files(path: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes; a link that leads nowhere has the size -1."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.exists():
            yield file.name, -1
        elif file.is_file():
            yield file.name, file.stat().st_size


def _parse(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    parsed, unreadable = {}, {}
    for name in (*_JSON_FILES, *INDEXES):
        if (folder / name).is_file():
            try:
                parsed[name] = read_json(folder / name)
            except CheckpointError as error:
                unreadable[name] = str(error)
    return parsed, unreadable


def _understand(
    config: Mapping[str, Any],
) -> tuple[Architecture | None, ModelConfig | None, ConfigError | None]:
    architecture = None
    try:
        architecture = find(str(config.get("model_type")))
        return architecture, architecture.config(config), None
    except ConfigError as error:
        return architecture, None, error


def _tokenizer(
    folder: Path | None, checkpoint: Checkpoint | None
) -> tuple[BytePairTokenizer | None, TokenizerError | None]:
    try:
        if checkpoint is not None:
            return load_tokenizer(checkpoint), None
        return (from_folder(folder), None) if folder else (None, None)
    except TokenizerError as error:
        return None, error
    except QwenkitError as error:
        return None, TokenizerError(str(error))
