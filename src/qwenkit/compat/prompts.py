"""`make_context`, `decode_tokens` and `get_stop_words_ids` of the first generation's snippets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenkit.chat.chatml import render_chatml
from qwenkit.compat.tokenizer import CompatTokenizer
from qwenkit.errors import UsageError
from qwenkit.types.messages import Message, parse_messages

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
    prompt = render_chatml(
        [Message("system", system), *conversation(query, history, "")],
        tokenizer=tokenizer.core,
        history_window_tokens=max_window_size,
    )
    return "".join(p.text for p in prompt.pieces), [i for p in prompt.pieces for i in p.ids]


def conversation(query: str, history: History | None, system: str) -> tuple[Message, ...]:
    """A history of (query, reply) pairs and a new query as messages; no system message if empty.

    Raises UsageError for anything else.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history or ():
        if not isinstance(turn, tuple | list) or len(turn) != 2:
            raise UsageError(f"history: expected (query, reply) pairs, got {turn!r}.")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return parse_messages([*messages, {"role": "user", "content": query}])


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
