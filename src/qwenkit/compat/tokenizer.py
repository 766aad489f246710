"""`AutoTokenizer` and the tokenizer object of the published snippets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch

from qwenkit.chat.render import render
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.hub import resolve
from qwenkit.errors import TokenizerError, UsageError, suggest
from qwenkit.load import load_tokenizer, read_architecture
from qwenkit.record import read_record
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.messages import Message, Tool, parse_messages, parse_tools
from qwenkit.types.record import ModelRecord
from qwenkit.types.tools import ToolOptions

Special = Literal["all"] | Collection[str]
Side = Literal["left", "right"]
Ids = int | Sequence[int] | torch.Tensor

_ROLES = ("pad_token", "eos_token", "bos_token")


class BatchEncoding(dict[str, Any]):
    """A dictionary whose entries are attributes too, and whose tensors move with `.to(device)`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Self:
        """Move every tensor, in place. Raises UsageError when the device is not there."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                try:
                    self[name] = value.to(device)
                except (AssertionError, RuntimeError) as error:  # how torch says there is none
                    raise UsageError(f"device: {device!r} is not there: {error}") from error
        return self


class CompatTokenizer:
    """A tokenizer with the calls of the published snippets; `core` is qwenkit's own.

    As in the originals, control tokens in text become control ids unless `allowed_special` says
    otherwise; `qwenkit.LLM` never does that.
    """

    def __init__(
        self,
        core: BytePairTokenizer,
        record: ModelRecord,
        *,
        padding_side: Side = "left",
        pad_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise UsageError(f"padding_side: got {padding_side!r}; allowed: 'left', 'right'.")
        self.core = core
        self.record = record
        self.padding_side = padding_side
        self.pad_token_id = core.control_id(pad_token) if pad_token else record.pad_token_id
        self.eos_token_id = core.control_id(eos_token) if eos_token else record.eos_token_id
        self.bos_token_id = record.bos_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id

    @cached_property
    def _vocab(self) -> dict[bytes | str, int]:
        return self.core.get_vocab()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.record.name!r}, {len(self)} ids>"

    def __len__(self) -> int:
        return self.core.vocab_size

    @property
    def vocab_size(self) -> int:
        """Ids in use, control tokens included."""
        return self.core.vocab_size

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token; assign another control token's text to change it."""
        return self._text(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, text: str) -> None:
        self.pad_token_id = self.core.control_id(text)

    @property
    def eos_token(self) -> str | None:
        """Text of the end token."""
        return self._text(self.eos_token_id)

    @property
    def eod_id(self) -> int:
        """Id of <|endoftext|>."""
        return self.core.control_tokens["<|endoftext|>"]

    @property
    def im_start_id(self) -> int:
        """Id of <|im_start|>."""
        return self.core.control_tokens["<|im_start|>"]

    @property
    def im_end_id(self) -> int:
        """Id of <|im_end|>."""
        return self.core.control_tokens["<|im_end|>"]

    def _text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.core.decode([token_id])

    def get_vocab(self) -> dict[bytes | str, int]:
        """Bytes of each regular token, text of each control token, to its id."""
        return self.core.get_vocab()

    def add_tokens(
        self, new_tokens: str | Sequence[str], special_tokens: bool = False
    ) -> Literal[0]:
        """Accept control tokens that are there already and return 0, the number added.

        Raises TokenizerError (a ValueError), as the originals do, for anything else.
        """
        self.core.add_tokens(new_tokens, special=special_tokens)
        return 0

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, str | Sequence[str]]
    ) -> Literal[0]:
        """Give control tokens that are there already a role: "pad_token", "eos_token", "bos_token",
        or none ("additional_special_tokens"); returns 0, the number added.

        Raises TokenizerError for tokens that are not there, UsageError for other roles.
        """
        for role, tokens in special_tokens_dict.items():
            if role not in (*_ROLES, "additional_special_tokens"):
                allowed = suggest(str(role), [*_ROLES, "additional_special_tokens"])
                raise UsageError(f"special_tokens_dict: got {role!r}. {allowed}")
            self.add_tokens(tokens, special_tokens=True)
            if role in _ROLES:
                setattr(self, f"{role}_id", self.core.control_id(str(tokens)))
        return 0

    def encode(
        self, text: str, *, allowed_special: Special = "all", disallowed_special: Special = ()
    ) -> list[int]:
        """Text to ids. Raises ValueError when `text` holds a disallowed control token."""
        return self.core.encode(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def tokenize(
        self, text: str, *, allowed_special: Special = "all", disallowed_special: Special = ()
    ) -> list[bytes | str]:
        """Text to tokens: bytes, or text for control tokens."""
        ids = self.encode(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        return self.convert_ids_to_tokens(ids)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[bytes | str]:
        """Ids to tokens: bytes, or text for control tokens."""
        return [self.core.token(int(i)) for i in ids]

    def convert_tokens_to_ids(self, tokens: bytes | str | Iterable[bytes | str]) -> Any:
        """Tokens (bytes, or text of control tokens) to ids. Raises TokenizerError."""
        if isinstance(tokens, bytes | str):
            found = self._vocab.get(tokens)
            if found is None and isinstance(tokens, str):
                found = self._vocab.get(tokens.encode("utf-8"))
            if found is None:
                raise TokenizerError(f"{tokens!r} is no token of this vocabulary.")
            return found
        return [self.convert_tokens_to_ids(t) for t in tokens]

    def decode(
        self, token_ids: Ids, skip_special_tokens: bool = False, errors: str = "replace"
    ) -> str:
        """Ids (a list, a tensor or one id) to text."""
        ids = _plain_ids(token_ids)
        return self.core.decode(ids, skip_special=skip_special_tokens, errors=errors)

    def batch_decode(
        self, sequences: Iterable[Ids], skip_special_tokens: bool = False, errors: str = "replace"
    ) -> list[str]:
        """Each id sequence to text."""
        return [self.decode(s, skip_special_tokens, errors) for s in sequences]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        allowed_special: Special = "all",
        disallowed_special: Special = (),
    ) -> BatchEncoding:
        """Texts to `input_ids` and `attention_mask`; lists, or tensors with return_tensors="pt".

        `padding` True or "longest" pads to the longest text on `padding_side`. Raises UsageError
        for texts of several lengths as a tensor without padding.
        """
        if return_tensors not in (None, "pt"):
            raise UsageError(f"return_tensors: got {return_tensors!r}; allowed: None, 'pt'.")
        if not isinstance(text, str | list | tuple) or not all(isinstance(t, str) for t in text):
            raise UsageError(
                f"text: expected a text or a list of texts, got {type(text).__name__}."
            )
        texts = [text] if isinstance(text, str) else list(text)
        rows = [
            self.encode(t, allowed_special=allowed_special, disallowed_special=disallowed_special)
            for t in texts
        ]
        if truncation:
            limit = max_length or self.record.context_tokens
            rows = [row[:limit] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding in (True, "longest"):
            rows, masks = self._pad(rows)
        elif padding not in (False, "do_not_pad"):
            raise UsageError(f"padding: got {padding!r}; allowed: False, True, 'longest'.")
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise UsageError("padding: texts of several lengths need padding=True.")
            ids, mask = torch.tensor(rows), torch.tensor(masks)  # [texts, length]
            return BatchEncoding(input_ids=ids, attention_mask=mask)
        single = isinstance(text, str)
        return BatchEncoding(
            input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks
        )

    def _pad(self, rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        if self.pad_token_id is None:
            raise UsageError("padding: this tokenizer has no pad_token; name one when loading it.")
        longest = max(len(row) for row in rows)
        padded, masks = [], []
        for row in rows:
            fill = longest - len(row)
            pads, zeros, ones = [self.pad_token_id] * fill, [0] * fill, [1] * len(row)
            left = self.padding_side == "left"
            padded.append(pads + row if left else row + pads)
            masks.append(zeros + ones if left else ones + zeros)
        return padded, masks

    def apply_chat_template(
        self,
        conversation: Iterable[Message | Mapping[str, Any]],
        *,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Messages to text (`tokenize=False`), ids, or tensors with return_tensors="pt".

        A checkpoint's own template alone says what becomes of tools, as everywhere else it is used.
        Message contents never become control ids. Raises RequestError or TemplateError.
        """
        dialect = "template" if self.record.chat_format == "template" else None
        rendered = render(
            parse_messages(conversation),
            tokenizer=self.core,
            record=self.record,
            tools=parse_tools(tools or ()),
            tool_options=ToolOptions(dialect=dialect),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not tokenize:
            return rendered.text
        ids: Any = list(rendered.ids)
        mask: Any = [1] * len(ids)
        if return_tensors == "pt":
            ids, mask = torch.tensor([ids]), torch.tensor([mask])  # [1, length]
        return BatchEncoding(input_ids=ids, attention_mask=mask) if return_dict else ids


def _plain_ids(token_ids: object) -> list[int]:
    if isinstance(token_ids, int):
        return [token_ids]
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable):
        kind = type(token_ids).__name__
        raise TokenizerError(f"token_ids: expected ids, got {kind}.")
    return [int(token_id) for token_id in token_ids]


class AutoTokenizer:
    """Finds the tokenizer of a model by its name or folder."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        use_fast: bool | None = None,
        padding_side: str = "left",
        pad_token: str | None = None,
        eos_token: str | None = None,
        extra_vocab_file: str | Path | None = None,
    ) -> CompatTokenizer:
        """Load a tokenizer, with the tokens of `extra_vocab_file` (of 'add-merges') if given.

        `trust_remote_code` and `use_fast` are accepted and not needed. Raises ModelNotFoundError,
        NetworkError, CheckpointError or TokenizerError.
        """
        path = resolve(str(pretrained_model_name_or_path), revision=revision)
        checkpoint = open_checkpoint(path)
        extra = None if extra_vocab_file is None else Path(extra_vocab_file)
        core = load_tokenizer(checkpoint, extra_vocab_file=extra)
        config = read_architecture(checkpoint)[1]
        return CompatTokenizer(
            core,
            read_record(checkpoint, core, config),
            padding_side=cast(Side, padding_side),
            pad_token=pad_token,
            eos_token=eos_token,
        )
