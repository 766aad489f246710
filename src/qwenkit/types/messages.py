"""Chat messages as plain data, and their reading from the OpenAI-style dictionaries users write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from qwenkit.errors import RequestError, suggest

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
_KEYS = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"),
    "function_call",  # a single call, as OpenAI's API had it before there were tools
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant made: `arguments` is the JSON text exactly as generated or
    given.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is plain text: it is never read for control tokens."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema.

    `title` is its name for people. `shown_parameters` is what the model is shown instead of the
    schema, where the definition had another shape. `args_format` "json" or "code" is how the first
    generation is told to write arguments, any other text the sentence itself; `strict` allows only
    arguments that the schema allows.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    title: str | None = None
    shown_parameters: Any = None
    args_format: str | None = None
    strict: bool = False


def parse_messages(items: Iterable[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """Read OpenAI-style message dictionaries (or pass `Message` objects through).

    Raises RequestError naming the message and key that cannot be used.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        kind = type(items).__name__
        raise RequestError(
            "messages", f"expected a list of messages, got one {kind}. Write [{{'role': …}}]."
        )
    messages = tuple(m if isinstance(m, Message) else _parse(i, m) for i, m in enumerate(items))
    if not messages:
        raise RequestError("messages", "expected at least one message, got an empty list.")
    return messages


def _parse(index: int, item: Mapping[str, Any]) -> Message:
    field = f"messages[{index}]"
    if not isinstance(item, Mapping):
        raise RequestError(
            field, f"expected a dictionary with 'role' and 'content', got {type(item).__name__}."
        )
    for key in item:
        if key not in _KEYS:
            raise RequestError(f"{field}.{key}", f"unknown key. {suggest(str(key), _KEYS)}")
    role = item.get("role")
    if role not in (*ROLES, "function"):  # its name before there were tools
        raise RequestError(f"{field}.role", f"got {role!r}; allowed: {', '.join(ROLES)}.")
    calls = tuple(
        _parse_call(f"{field}.tool_calls[{j}]", c)
        for j, c in enumerate(item.get("tool_calls") or ())
    )
    if item.get("function_call") is not None:
        calls += (_parse_call(f"{field}.function_call", item["function_call"]),)
    if calls and role != "assistant":
        raise RequestError(f"{field}.role", f"got {role!r}; only the assistant calls tools.")
    return Message(
        role=cast(Role, "tool" if role == "function" else role),
        content=_parse_content(f"{field}.content", item.get("content"), optional=bool(calls)),
        name=_optional_text(f"{field}.name", item.get("name")),
        tool_calls=calls,
        tool_call_id=_optional_text(f"{field}.tool_call_id", item.get("tool_call_id")),
        reasoning_content=_optional_text(
            f"{field}.reasoning_content", item.get("reasoning_content")
        ),
    )


def _parse_content(field: str, content: object, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(
        content, list
    ):  # OpenAI's list of parts; only text parts make sense for a text model
        texts = []
        for i, part in enumerate(content):
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise RequestError(
                    f"{field}[{i}]",
                    "only parts of the form {'type': 'text', 'text': …} are supported.",
                )
            texts.append(part["text"])
        return "".join(texts)
    raise RequestError(field, f"expected text, got {type(content).__name__}.")


def _parse_call(field: str, call: object) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(field, "expected {'function': {'name': …, 'arguments': …}}.")
    arguments = function.get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    identifier = call.get("id") if isinstance(call, Mapping) else None
    return ToolCall(
        name=function["name"], arguments=text, id=_optional_text(f"{field}.id", identifier)
    )


def _optional_text(field: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise RequestError(field, f"expected text, got {type(value).__name__}.")


def parse_tools(items: Iterable[Tool | Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Read tool dictionaries in OpenAI's shape or the first generation's. Raises RequestError
    naming the tool that cannot be used.
    """
    tools = tuple(
        t if isinstance(t, Tool) else _parse_tool(f"tools[{i}]", t) for i, t in enumerate(items)
    )
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise RequestError(f"tools[{i}]", f"there is another tool of the name {tool.name!r}.")
        names.add(tool.name)
    return tools


def _parse_tool(field: str, item: object) -> Tool:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    name = None
    if isinstance(function, Mapping):  # the first generation's own shape has three names
        name = function.get("name_for_model", function.get("name"))
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise RequestError(
            field, "expected {'type': 'function', 'function': {'name': …, 'parameters': …}}."
        )
    given = function.get("parameters") or {}
    description = function.get("description_for_model", function.get("description")) or ""
    is_list = isinstance(given, list) and all(isinstance(each, Mapping) for each in given)
    if not (isinstance(given, Mapping) or is_list) or not isinstance(description, str):
        raise RequestError(field, "'parameters' must be a JSON schema and 'description' text.")
    return Tool(
        name=name,
        description=description,
        parameters=_schema_of_list(given) if is_list else dict(given),
        title=_optional_text(f"{field}.name_for_human", function.get("name_for_human")),
        shown_parameters=given if is_list else None,
        args_format=_optional_text(f"{field}.args_format", function.get("args_format")),
        strict=function.get("strict") is True,
    )


_NOT_OF_A_SCHEMA = ("name", "required", "schema")


def _schema_of_list(parameters: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of parameters in Qwen's own shape: a list of {"name": …, "required": …, "schema":
    …}, or with what the schema says beside the name.
    """
    named = {str(each.get("name")): each for each in parameters}
    return {
        "type": "object",
        "properties": {
            name: {
                **{key: said for key, said in each.items() if key not in _NOT_OF_A_SCHEMA},
                **(each["schema"] if isinstance(each.get("schema"), Mapping) else {}),
            }
            for name, each in named.items()
        },
        "required": [name for name, each in named.items() if each.get("required") is True],
    }
