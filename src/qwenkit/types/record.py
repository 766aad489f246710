"""The model record: what a checkpoint says of its own use, read once and shared by every room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwenkit.types.sampling import SamplingParams

ChatFormat = Literal["template", "chatml", "raw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Facts of one checkpoint that are not tensors.

    `chat_format`: "template" renders `chat_template` (the checkpoint's own Jinja text), "chatml" is
    the built-in ChatML of the first generation, "raw" is a base model that must not be chatted
    with. `stop_token_ids` end every output (all eos ids and the end of a ChatML turn). `sampling`
    holds the model's own defaults. `trained_context_tokens` is the length the weights were trained
    for, `context_tokens` the length allowed (they differ under rope scaling).
    `history_window_tokens` is the first generation's `max_window_size`: older turns beyond it are
    dropped and reported.
    """

    name: str
    model_type: str
    chat_format: ChatFormat
    context_tokens: int
    trained_context_tokens: int
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    vocab_rows: int
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    chat_template: str | None = field(default=None, repr=False)
    default_system: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    history_window_tokens: int | None = None
    dialect: str | None = None
    licence: str | None = None
    quantization: str | None = None
    stored_dtype: str | None = None
