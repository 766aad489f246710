"""A byte tokenizer with fourteen control tokens, model records, and the published formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qwenkit.tokenizer.stream import Utf8Stream
from qwenkit.types.protocols import AllowedSpecial, TokenStream
from qwenkit.types.record import ModelRecord

TEMPLATES = Path(__file__).parents[1] / "golden" / "chat" / "templates"
TEMPLATE_NAMES = sorted(path.name for path in TEMPLATES.glob("*.jinja"))

CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
)
START, END = 257, 258


class ControlBytes:
    """Ids 0 to 255 are bytes; those after are the control tokens given, in order."""

    def __init__(self, control: Sequence[str] = CONTROL) -> None:
        self.control_tokens = {name: 256 + i for i, name in enumerate(control)}
        self.vocab_size = 256 + len(control)
        self._names = dict(zip(self.control_tokens.values(), control, strict=True))

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        if allowed_special == "all":
            names = "|".join(map(re.escape, self.control_tokens))
            return [
                i
                for part in re.split(f"({names})", text)
                for i in (
                    [self.control_tokens[part]]
                    if part in self.control_tokens
                    else part.encode("utf-8", "surrogatepass")
                )
            ]
        assert allowed_special == ()
        return list(text.encode("utf-8", "surrogatepass"))

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else self._names[token_id].encode()

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = False, errors: str = "replace"
    ) -> str:
        kept = [i for i in ids if i < 256 or not skip_special]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "surrogatepass")

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """Names of tokens show in the text but for those in pipes."""
        hidden = [i for name, i in self.control_tokens.items() if name.startswith("<|")]
        return Utf8Stream(self.token_bytes, skipped_ids=hidden if skip_special else ())

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        """The control ids among `ids`, in order."""
        return [i for i in ids if i >= 256]


def template_record(source: str) -> ModelRecord:
    """The record of a model with this chat template."""
    return ModelRecord(
        name="toy",
        model_type="qwen2",
        chat_format="template",
        context_tokens=32768,
        trained_context_tokens=32768,
        stop_token_ids=(END,),
        vocab_size=270,
        vocab_rows=272,
        chat_template=source,
        bos_token_id=256,
        eos_token_id=END,
    )


def published_record(name: str) -> ModelRecord:
    """The record of a model with the template of that file."""
    return template_record((TEMPLATES / name).read_text(encoding="utf-8"))


def chatml_record(
    *, default_system: str | None = None, history_window_tokens: int | None = None
) -> ModelRecord:
    """The record of a first-generation chat model."""
    return ModelRecord(
        name="Qwen-7B-Chat",
        model_type="qwen",
        chat_format="chatml",
        context_tokens=8192,
        trained_context_tokens=8192,
        stop_token_ids=(END,),
        vocab_size=270,
        vocab_rows=272,
        default_system=default_system,
        history_window_tokens=history_window_tokens,
    )
