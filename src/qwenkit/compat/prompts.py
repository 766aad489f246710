"""`make_context`, `decode_tokens` and `get_stop_words_ids` of the first generation's snippets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenkit.chat.chatml import render_chatml
from qwenkit.compat.tokenizer import CompatTokenizer
from qwenkit.errors import UsageError
from qwenkit.types.messages import Message

History = Sequence[tuple[str, str]]


def make_context(
    tokenizer: CompatTokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt of one chat turn as (text, ids).

    Control tokens in `query`, `system` and `history` stay text. The newest turns of the history are
    kept while they and the system turn stay below `max_window_size` tokens. Raises UsageError for
    an unknown format.
    """
    if chat_format == "raw":
        return query, tokenizer.core.encode(query)
    if chat_format != "chatml":
        raise UsageError(f"chat_format: got {chat_format!r}; allowed: 'chatml', 'raw'.")
    messages = [Message("system", system)]
    for past_query, past_reply in history or []:
        messages += [Message("user", past_query), Message("assistant", past_reply)]
    prompt = render_chatml(
        [*messages, Message("user", query)],
        tokenizer=tokenizer.core,
        history_window_tokens=max_window_size,
    )
    return "".join(p.text for p in prompt.pieces), [i for p in prompt.pieces for i in p.ids]


def get_stop_words_ids(chat_format: str, tokenizer: CompatTokenizer) -> list[list[int]]:
    """The id sequences that end a turn in a chat format. Raises UsageError for an unknown one."""
    controls = tokenizer.core.control_tokens
    if chat_format == "chatml":
        return [[controls["<|im_end|>"]], [controls["<|im_start|>"]]]
    if chat_format == "raw":
        return [tokenizer.core.encode("Human:"), [controls["<|endoftext|>"]]]
    raise UsageError(f"chat_format: got {chat_format!r}; allowed: 'chatml', 'raw'.")


def decode_tokens(
    tokens: Any,
    tokenizer: CompatTokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The reply within `tokens` (prompt and output ids, a list or a tensor).

    `context_length` counts the prompt's tokens; `raw_text_len`, its characters, is used for the
    raw format. With `return_end_reason` the reason is given beside the text, in the original's
    words. `verbose` is accepted and has no effect.
    """
    ids = [int(i) for i in tokens]
    ends = {s[0]: s for s in get_stop_words_ids(chat_format, tokenizer) if len(s) == 1}
    stop_at, reason = len(ids), f"Gen length {len(ids)}"
    for position in range(context_length, len(ids)):
        if ids[position] in ends:
            stop_at = position
            reason = f"Gen {tokenizer.core.decode([ids[position]])!r}"
            break
    if chat_format == "raw":
        text = tokenizer.core.decode(ids[:stop_at], errors=errors)[raw_text_len:]
        text = text.split("Human:", 1)[0]
    else:
        text = tokenizer.core.decode(ids[context_length:stop_at], errors=errors)
    text = text.strip()
    return (text, reason) if return_end_reason else text
