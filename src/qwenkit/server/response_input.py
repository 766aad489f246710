"""A request of /v1/responses in the words of /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from qwenkit.server.errors import ApiError
from qwenkit.server.wire.responses import (
    CallItem,
    FunctionChoice,
    MessageItem,
    OutputItem,
    RefusedPart,
    ResponsesRequest,
    ThoughtItem,
)

_SAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream"),
    *("user", "safety_identifier", "chat_template_kwargs", "timeout_s", "priority", "cache_salt"),
)


def chat_fields(body: ResponsesRequest) -> dict[str, Any]:
    """The fields of a chat request that asks for the same. Raises ApiError."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields["messages"] = _messages(body)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["response_format"] = _format(body)
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    fields["parallel_tool_calls"] = body.parallel_tool_calls
    if body.include or body.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return {name: value for name, value in fields.items() if value is not None}


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    given = None if body.text is None else body.text.format
    if given is None or given.type != "json_schema":
        return None if given is None else {"type": given.type}
    if given.name is None or given.schema_ is None:
        missing = "name" if given.name is None else "schema"
        where = f"text.format.{missing}"
        raise ApiError(400, f"{where}: this field is needed.", where, "missing_required_parameter")
    schema = given.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
    return {"type": "json_schema", "json_schema": schema}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thought: str | None = None
    for item in body.input:
        if isinstance(item, ThoughtItem):
            thought = "".join(part.text for part in item.content or item.summary)
            continue
        if isinstance(item, OutputItem):
            content = item.output if isinstance(item.output, str) else _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        elif isinstance(item, MessageItem):
            content = item.content if isinstance(item.content, str) else _text(item.content)
            messages.append({"role": item.role, "content": content})
        else:
            _add_call(messages, item)
        if thought is not None and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = None
    return messages


def _add_call(messages: list[dict[str, Any]], item: CallItem) -> None:
    """Calls and the text before them are one turn of the assistant's."""
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(parts: list[Any]) -> str:
    return "".join(p.refusal if isinstance(p, RefusedPart) else p.text for p in parts)
