"""The tools of a request, in OpenAI's words of today and of before."""

from __future__ import annotations

from typing import Any

from qwenkit.server.errors import ApiError
from qwenkit.server.wire.chat import ChatRequest, NamedFunction, NamedTool
from qwenkit.types.tools import ToolOptions


def tools_of(body: ChatRequest) -> tuple[list[dict[str, Any]], ToolOptions]:
    """The tools and how they may be called. Raises ApiError."""
    if body.functions is not None or body.function_call is not None:
        return _functions(body)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice
    if choice is None:
        choice = "auto"
    elif not tools and choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice: there are no tools.", "tool_choice", "invalid_value")
    _check_names([tool["function"]["name"] for tool in tools], "tools")
    name = choice.function.name if isinstance(choice, NamedTool) else choice
    _check_named(choice, name, [tool["function"]["name"] for tool in tools], "tool_choice")
    return tools, ToolOptions(choice=name, parallel=body.parallel_tool_calls is not False)


def _functions(body: ChatRequest) -> tuple[list[dict[str, Any]], ToolOptions]:
    """What was before the tools: at most one call in a reply."""
    if body.tools is not None or body.tool_choice is not None:
        raise ApiError(
            400,
            "functions: the old functions and tools exclude each other; give tools.",
            "functions",
            "invalid_value",
        )
    functions = [function.model_dump(exclude_none=True) for function in body.functions or ()]
    names = [str(f.get("name_for_model", f.get("name", ""))) for f in functions]
    for place, name in enumerate(names):
        if not name:
            where = f"functions[{place}].name"
            raise ApiError(400, f"{where}: this field is needed.", where, "invalid_value")
    _check_names(names, "functions")
    choice = body.function_call or "auto"
    name = choice.name if isinstance(choice, NamedFunction) else choice
    _check_named(choice, name, names, "function_call")
    return functions, ToolOptions(choice=name, parallel=False)


def _check_names(names: list[str], field: str) -> None:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        message = f"{field}: the name {twice!r:.100} is there twice."
        raise ApiError(400, message, field, "invalid_value")


def _check_named(choice: object, name: str, names: list[str], field: str) -> None:
    if not isinstance(choice, str) and name not in names:
        message = f"{field}: {name!r:.100} is none of the given ones: {', '.join(names)[:200]}."
        raise ApiError(400, message, field, "invalid_value")
