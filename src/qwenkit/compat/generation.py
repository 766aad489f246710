"""`GenerationConfig` with the fields of the published generation_config.json files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.hub import resolve
from qwenkit.errors import UsageError, suggest
from qwenkit.load import load_tokenizer, read_architecture
from qwenkit.record import read_record
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GenerationConfig:
    """How `generate` and `chat` choose and stop; changed by assignment, as in the snippets.

    `do_sample` False is greedy whatever the other fields say. An unknown field is an error naming
    the nearest known one. `max_new_tokens` None means: to the end of the context. `use_cache`,
    `num_return_sequences` and `num_beams` are there for snippets that state their defaults.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    chat_format: str | None = None
    max_window_size: int | None = None
    stop_words_ids: list[list[int]] | None = None
    seed: int | None = None
    use_cache: bool = True
    num_return_sequences: int = 1
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, supported in (("use_cache", True), ("num_return_sequences", 1), ("num_beams", 1)):
            if getattr(self, name) != supported:
                raise UsageError(f"{name}: only {supported} is supported so far.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """The model's own defaults, which its generation_config.json overrides where it has one;
        keyword arguments override single fields.

        Fields that the file has and nothing here uses are logged. `trust_remote_code` is accepted
        and not needed: no remote code is ever run. Raises UsageError for an unknown override.
        """
        checkpoint = open_checkpoint(resolve(str(pretrained_model_name_or_path), revision=revision))
        given = checkpoint.generation_config
        known = set(_names())
        unused = sorted(set(given) - known - {"transformers_version", "_from_model_config"})
        if unused:
            log.info("%s: fields without effect here: %s", checkpoint.path, ", ".join(unused))
        core = load_tokenizer(checkpoint)
        record = read_record(checkpoint, core, read_architecture(checkpoint)[1])
        fields = {name: value for name, value in given.items() if name in known}
        return dataclasses.replace(cls.from_record(record), **fields).updated(overrides)

    @classmethod
    def from_record(cls, record: ModelRecord) -> Self:
        """The model record's own defaults in this form."""
        sampling = record.sampling
        return cls(
            max_new_tokens=sampling.max_tokens,
            do_sample=not sampling.greedy,
            temperature=None if sampling.greedy else sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(record.stop_token_ids),
            pad_token_id=record.pad_token_id,
            bos_token_id=record.bos_token_id,
            chat_format=record.chat_format,
            max_window_size=record.history_window_tokens,
        )

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """A copy with fields changed. Raises UsageError naming an unknown field's nearest."""
        names = _names()
        for name in changes:
            if name not in names:
                raise UsageError(f"{name}: unknown generation option. {suggest(name, names)}")
        return dataclasses.replace(self, **changes)

    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an output."""
        eos = self.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)

    def sampling(self) -> SamplingParams:
        """As the engine takes it. Raises RequestError naming a field that cannot be used."""
        values: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "seed": self.seed,
            "stop_token_ids": self.eos_ids(),
            "stop_token_sequences": tuple(tuple(s) for s in self.stop_words_ids or ()),
        }
        optional = {
            "min_tokens": self.min_new_tokens,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        values |= {name: value for name, value in optional.items() if value is not None}
        temperature = 1.0 if self.temperature is None else self.temperature
        values["temperature"] = temperature if self.do_sample else 0.0
        return SamplingParams(**values)


def _names() -> list[str]:
    return [f.name for f in dataclasses.fields(GenerationConfig)]
