"""Conversations to prompt ids: the one renderer under chatting, serving and training.

A message's content, a tool's name or an argument can never become a control token, in any format
(see `guard` for how). On texts without control tokens the ids are those of the checkpoint's
published template. Must not know engines, HTTP or files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qwenkit.chat.chatml import ChatMLPrompt, render_chatml
from qwenkit.chat.dialects.spec import Conversation, Dialect, Written, find, visible
from qwenkit.chat.guard import Guard, planes
from qwenkit.chat.pieces import TURN_END, Piece, cut_before_turn_end, loss_mask, split_marked
from qwenkit.chat.replies import ReplyFormat, open_turn, thinks
from qwenkit.chat.rewrite import in_call_order
from qwenkit.chat.template import compile_template, run_template
from qwenkit.chat.values import JsonObject, Limits
from qwenkit.errors import RequestError, UsageError
from qwenkit.types.messages import ROLES, Message, Tool, ToolCall
from qwenkit.types.protocols import Tokenizer
from qwenkit.types.record import ModelRecord
from qwenkit.types.tools import ToolOptions

Text = Callable[[str], str]

_MAX_DEPTH = 100
_RESERVED = (
    "messages tools documents add_generation_prompt bos_token eos_token pad_token "
    "range dict namespace raise_exception strftime_now"
)
_USUAL_DIALECT = {"chatml": "react", "template": "template"}
_BASE_MODEL = (
    "{name} is a base model: it continues text and knows no chat format. Load a chat model "
    '("Qwen/Qwen-7B-Chat" rather than "Qwen/Qwen-7B", "Qwen/Qwen2-7B-Instruct" rather than '
    '"Qwen/Qwen2-7B"), or have this one continue a text: `qwenkit generate`.\n'
    "{name} 是基座模型，只会续写文本，没有对话格式。对话请加载对话模型"
    "（用“Qwen/Qwen-7B-Chat”而不是“Qwen/Qwen-7B”，用“Qwen/Qwen2-7B-Instruct”而不是“Qwen/Qwen2-7B”），"
    "或者用 `qwenkit generate` 续写文本。"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt.

    `text` is for reading: control tokens and texts that look like them cannot be told apart in it.
    `loss_mask` has one entry per id, 1 where an assistant speaks (the end of its turn included);
    None when the template's turns are not ChatML's. `dropped_messages` and `dropped_tokens` count
    what the history window of a first-generation model left out. `reply` is what the reply to this
    prompt needs.
    """

    ids: tuple[int, ...]
    text: str
    loss_mask: tuple[int, ...] | None
    reply: ReplyFormat
    dropped_messages: int = 0
    dropped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One row of `inspect`: `text` shows bytes that are no whole character as \\xNN."""

    position: int
    token_id: int
    text: str
    control: bool
    learned: bool


def render(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    record: ModelRecord,
    tools: Sequence[Tool] = (),
    tool_options: ToolOptions | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """Messages to prompt ids, in the format that the model record names.

    Tools, calls and results are in the dialect that `tool_options` or the record names, else as the
    template has them; behind a result the prompt may end within the assistant's turn.
    With `continue_final_message` the last message must be the assistant's and the prompt ends
    within it, before the token that would end its turn; no generation prompt follows then.
    `template_kwargs` are further variables for the template (plain JSON values).

    Raises RequestError naming the field that cannot be used, TemplateError when the checkpoint's
    template fails or refuses the conversation, UsageError for a base model.
    """
    _check(messages, record, continue_final_message)
    options = tool_options or ToolOptions()
    template = record.chat_template if record.chat_format == "template" else None
    conversation = Conversation(
        messages=tuple(messages),
        tools=visible(tools, options),
        options=options,
        continues=continue_final_message,
        template=template,
    )
    dialect = find(options.dialect or record.dialect or _USUAL_DIALECT[record.chat_format])
    written = _written(dialect, conversation)
    start = written.reply_start
    continues = continue_final_message or (start is not None and add_generation_prompt)
    prompt = _prompt(
        written,
        tokenizer=tokenizer,
        record=record,
        template_kwargs=template_kwargs or {},
        add_generation_prompt=add_generation_prompt and not continues,
    )
    pieces = _continued(prompt.pieces, tokenizer, record) if continues else prompt.pieces
    return Rendered(
        ids=tuple(token_id for piece in pieces for token_id in piece.ids),
        text="".join(piece.text for piece in pieces),
        loss_mask=loss_mask(pieces, tokenizer, open_turn=continues or not add_generation_prompt),
        reply=ReplyFormat(
            dialect=dialect,
            tools=conversation.tools,
            options=options,
            start=open_turn(pieces, record.stop_token_ids) if start is None else start,
            thinks=thinks(template),
            control_tokens=frozenset(tokenizer.control_tokens),
        ),
        dropped_messages=prompt.dropped_messages,
        dropped_tokens=prompt.dropped_tokens,
    )


def _written(dialect: Dialect, conversation: Conversation) -> Written:
    """The conversation with its tools in the dialect; as it is where there are none."""
    messages, tools = conversation.messages, conversation.tools
    for i, tool in enumerate(tools):
        _mapped(tool.parameters, str, f"tools[{i}].parameters")
        _mapped(tool.shown_parameters, str, f"tools[{i}].parameters")
    if not tools and not any(m.role == "tool" or m.tool_calls for m in messages):
        return Written(messages=messages)
    if dialect.name != "template":
        conversation = replace(conversation, messages=in_call_order(messages))
    return dialect.write(conversation)


def _prompt(
    written: Written,
    *,
    tokenizer: Tokenizer,
    record: ModelRecord,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool,
) -> ChatMLPrompt:
    """The pieces of a conversation, by the checkpoint's template or as built-in ChatML."""
    messages, tools = written.messages, written.tools
    if record.chat_format == "template" and record.chat_template is not None:
        given = partial(_variables, messages, tools, template_kwargs, add_generation_prompt)
        pieces = _template_pieces(record.chat_template, given, tokenizer, record)
        return ChatMLPrompt(tuple(pieces), dropped_messages=0, dropped_tokens=0)
    if template_kwargs:
        message = f"{record.name} has no chat template that could use them."
        raise RequestError("template_kwargs", message)
    return render_chatml(
        messages,
        tokenizer=tokenizer,
        default_system=record.default_system,
        history_window_tokens=record.history_window_tokens,
        add_generation_prompt=add_generation_prompt,
    )


def inspect(rendered: Rendered, tokenizer: Tokenizer) -> tuple[InspectedToken, ...]:
    """Text and ids side by side, one row per id."""
    control_ids = set(tokenizer.control_tokens.values())
    learned = rendered.loss_mask or (0,) * len(rendered.ids)
    return tuple(
        InspectedToken(
            position=position,
            token_id=token_id,
            text=tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace"),
            control=token_id in control_ids,
            learned=bool(learned[position]),
        )
        for position, token_id in enumerate(rendered.ids)
    )


def _check(messages: Sequence[Message], record: ModelRecord, continue_final_message: bool) -> None:
    if record.chat_format == "raw":
        raise UsageError(_BASE_MODEL.format(name=record.name))
    if record.chat_format == "template" and record.chat_template is None:
        raise UsageError(f"{record.name}: its record promises a chat template but holds none.")
    if record.chat_format == "template" and not (record.chat_template or "").strip():
        raise UsageError(
            f"{record.name}: its chat template is empty. Copy chat_template from the original "
            "model's tokenizer_config.json."
        )
    if not messages:
        raise RequestError("messages", "expected at least one message, got none.")
    for i, message in enumerate(messages):
        if message.role not in ROLES:  # roles are written as they are, so they must be ours
            raise RequestError(
                f"messages[{i}].role", f"got {message.role!r}; allowed: {', '.join(ROLES)}."
            )
    if continue_final_message and messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message",
            f"the last message must be the assistant's, got the role {messages[-1].role!r}.",
        )


def _template_pieces(
    source: str, given: Callable[[Text], dict[str, Any]], tokenizer: Tokenizer, record: ModelRecord
) -> list[Piece]:
    template = compile_template(source)
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    given(collect)
    limits = Limits.for_conversation(texts=len(texts), characters=sum(map(len, texts)))
    special = _special_tokens(tokenizer, record)
    guard = Guard(
        tokenizer.control_tokens,
        given=planes("".join(texts)),
        own=template.planes | planes("".join(special.values())),
        max_characters=limits.value_characters,
        max_items=limits.value_items,
    )
    variables = {**given(guard.guarded), **special}
    marked = run_template(template, variables, guard=guard, limits=limits)
    return list(split_marked(marked, guard, tokenizer))


def _special_tokens(tokenizer: Tokenizer, record: ModelRecord) -> dict[str, str]:
    ids = {
        "bos_token": record.bos_token_id,
        "eos_token": record.eos_token_id,
        "pad_token": record.pad_token_id,
    }
    return {
        name: tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        for name, token_id in ids.items()
        if token_id is not None
    }


def _continued(
    pieces: Sequence[Piece], tokenizer: Tokenizer, record: ModelRecord
) -> Sequence[Piece]:
    end_ids = {*record.stop_token_ids, tokenizer.control_tokens.get(TURN_END)} - {None}
    cut = cut_before_turn_end(pieces, end_ids)
    if cut is None:
        raise RequestError(
            "continue_final_message",
            f"{record.name} does not end its turns with a token, so there is no turn to reopen.",
        )
    return cut


def _variables(
    messages: Iterable[Message],
    tools: Iterable[Tool],
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool,
    text: Text,
) -> dict[str, Any]:
    """What a template is given, in the shape that published templates expect, with `text` applied
    to every string that comes from outside.
    """
    for name in kwargs:
        if name in _RESERVED.split() or not str(name).isidentifier():
            raise RequestError(f"template_kwargs.{name}", "this name cannot be set.")
    return {
        **{n: _mapped(v, text, f"template_kwargs.{n}") for n, v in kwargs.items()},
        "messages": [_message(m, text, f"messages[{i}]") for i, m in enumerate(messages)],
        "tools": [_tool(tool, text, f"tools[{i}]") for i, tool in enumerate(tools)] or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }


def _message(message: Message, text: Text, field: str) -> dict[str, Any]:
    # The role is one of four words, checked; it is part of what the template itself writes.
    value: dict[str, Any] = {"role": message.role, "content": text(message.content)}
    for key in ("name", "reasoning_content", "tool_call_id"):
        given = getattr(message, key)
        if given is not None:
            value[key] = text(given)
    if message.tool_calls:
        value["tool_calls"] = [_tool_call(call, text, field) for call in message.tool_calls]
    return value


def _tool_call(call: ToolCall, text: Text, field: str) -> dict[str, Any]:
    function = {"name": text(call.name), "arguments": _arguments(call.arguments, text, field)}
    identified = {} if call.id is None else {"id": text(call.id)}
    return {**identified, "type": "function", "function": function}


def _arguments(source: str, text: Text, field: str) -> Any:
    """The arguments as an object, as most templates expect them; the text itself if it is none."""
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        return text(source)
    if not isinstance(value, dict):
        return text(source)
    return JsonObject(_mapped(value, text, f"{field}.tool_calls"), text(source))


def _tool(tool: Tool, text: Text, field: str) -> dict[str, Any]:
    function = {
        "name": text(tool.name),
        "description": text(tool.description),
        "parameters": _mapped(tool.parameters, text, f"{field}.parameters"),
    }
    return {"type": "function", "function": function}


def _mapped(value: Any, text: Text, field: str, depth: int = 0) -> Any:
    """A JSON value with `text` applied to every string in it, keys included."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, int | float):
        return value
    if depth == _MAX_DEPTH:
        raise RequestError(field, f"nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, Mapping):
        return {
            _mapped(key, text, field, _MAX_DEPTH): _mapped(inner, text, field, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(inner, text, field, depth + 1) for inner in value]
    raise RequestError(field, f"expected plain JSON, got a value of type {type(value).__name__}.")
