"""✿FUNCTION✿: the lines in which Qwen2 writes calls, results and what follows them into one turn.

A turn of the assistant goes on behind the results of its tools, so that a prompt that ends with a
result ends within the assistant's turn.

Source: Qwen-Agent, whose prompts for Qwen2 these are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from qwenkit.chat.dialects.spec import Conversation, Dialect, Written
from qwenkit.chat.grammar import CallGrammar, Calls, literal
from qwenkit.chat.parse import read_arguments
from qwenkit.chat.rewrite import with_instruction
from qwenkit.chat.tape import Steps, Tape
from qwenkit.errors import RequestError
from qwenkit.types.messages import Message, Tool

NAME, ARGUMENTS, RESULT, RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
_NAME_MARK, _ARGUMENTS_MARK = f"{NAME}:", f"{ARGUMENTS}:"
_ENDS = (_NAME_MARK, _ARGUMENTS_MARK, RESULT, RETURN)
_LONGEST_NAME = 256
_CODE_TOOL = "code_interpreter"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_COLON = re.compile(r":? ?")

_TOOLS = {
    "en": "# Tools\n\n## You have access to the following tools:\n\n{tools}\n\n",
    "zh": "# 工具\n\n## 你拥有如下工具：\n\n{tools}\n\n",
}
_SINGLE = {
    "en": f"""## When you need to call a tool, please insert the following command in your reply, \
which can be called zero or multiple times according to your needs:

{NAME}: The tool to use, should be one of [{{names}}]
{ARGUMENTS}: The input of the tool
{RESULT}: Tool results
{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)""",
    "zh": f"""## 你可以在回复中插入零次、一次或多次以下命令以调用工具：

{NAME}: 工具名称，必须是[{{names}}]之一。
{ARGUMENTS}: 工具输入
{RESULT}: 工具结果
{RETURN}: 根据工具结果进行回复，需将图片用![](url)渲染出来""",
}
_PARALLEL = {
    "en": f"""## Insert the following command in your reply when you need to call N tools in \
parallel:

{NAME}: The name of tool 1, should be one of [{{names}}]
{ARGUMENTS}: The input of tool 1
{NAME}: The name of tool 2
{ARGUMENTS}: The input of tool 2
...
{NAME}: The name of tool N
{ARGUMENTS}: The input of tool N
{RESULT}: The result of tool 1
{RESULT}: The result of tool 2
...
{RESULT}: The result of tool N
{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)""",
    "zh": f"""## 你可以在回复中插入以下命令以并行调用N个工具：

{NAME}: 工具1的名称，必须是[{{names}}]之一
{ARGUMENTS}: 工具1的输入
{NAME}: 工具2的名称
{ARGUMENTS}: 工具2的输入
...
{NAME}: 工具N的名称
{ARGUMENTS}: 工具N的输入
{RESULT}: 工具1的结果
{RESULT}: 工具2的结果
...
{RESULT}: 工具N的结果
{RETURN}: 根据工具结果进行回复，需将图片用![](url)渲染出来""",
}
_PARAMETERS = {"en": "Parameters", "zh": "输入参数"}
_COLONS = {"en": ": ", "zh": "："}
_FORMATS = {
    "en": {
        "json": "Format the arguments as a JSON object.",
        "code": "Enclose the code within triple backticks (`) at the beginning and end of the "
        "code.",
    },
    "zh": {"json": "此工具的输入应为JSON对象。", "code": "此工具的输入应为Markdown代码块。"},
}


# -- writing -------------------------------------------------------------------------------------


def write(conversation: Conversation) -> Written:
    """Tools in the system message; calls, results and answers in one turn of the assistant's.

    Raises RequestError for a result that follows no assistant's message.
    """
    messages: list[Message] = []
    for i, message in enumerate(conversation.messages):
        if message.role == "tool":
            if not messages or messages[-1].role != "assistant":
                raise RequestError(f"messages[{i}]", "a tool's result must follow a call of it.")
            before = messages[-1].content.removesuffix(f"\n{RETURN}: ")
            joined = f"{before}\n{RESULT}: {message.content}\n{RETURN}: "
            messages[-1] = replace(messages[-1], content=joined)
            continue
        content = message.content + _calls(message, first=not message.content)
        if message.role == "assistant" and messages and messages[-1].role == "assistant":
            lead = "\n" if not message.content and message.tool_calls else ""
            content = messages[-1].content + lead + content
            messages[-1] = replace(messages[-1], content=content)
        else:
            messages.append(replace(message, content=content, tool_calls=()))
    if conversation.tools:
        messages = _with_tools(messages, conversation)
    return _with_start(messages, conversation)


def _calls(message: Message, *, first: bool) -> str:
    """The lines of a message's calls, behind its text."""
    parts = []
    for call in message.tool_calls:
        arguments = call.arguments
        arguments = f"\n{arguments}" if arguments.startswith("```") else arguments
        parts.append(f"{NAME}: {call.name}\n{ARGUMENTS}: {arguments}")
    text = "\n".join(parts)
    return text if first or not parts else f"\n{text}"


def _with_tools(messages: Sequence[Message], conversation: Conversation) -> list[Message]:
    options = conversation.options
    language: str = options.language
    if language == "auto":
        texts = [m.content for m in messages if m.role in ("system", "user")]
        language = "zh" if any(map(_CHINESE.search, texts)) else "en"
    form = (_PARALLEL if options.parallel else _SINGLE)[language]
    tools = "\n\n".join(_described(tool, language) for tool in conversation.tools)
    names = ",".join(tool.name for tool in conversation.tools)
    instruction = _TOOLS[language].format(tools=tools) + form.format(names=names)
    return list(with_instruction(messages, instruction))


def _described(tool: Tool, language: str) -> str:
    shown = tool.parameters if tool.shown_parameters is None else tool.shown_parameters
    usual = "code" if tool.name == _CODE_TOOL else "json"
    given = usual if tool.args_format is None else tool.args_format
    parameters = json.dumps(shown, ensure_ascii=False)
    line = (
        f"### {tool.title or tool.name}\n\n{tool.name}: {tool.description} "
        f"{_PARAMETERS[language]}{_COLONS[language]}{parameters} "
        f"{_FORMATS[language].get(given, given)}"
    )
    return line.rstrip()


def _with_start(messages: list[Message], conversation: Conversation) -> Written:
    """Where the reply goes on: behind the results, or within a call that must come."""
    named = conversation.options.named
    last = messages[-1]
    goes_on = last.role == "assistant" and last.content.endswith(f"{RETURN}: ")
    if named is None or conversation.continues:
        if not goes_on:
            return Written(messages=tuple(messages))
        # ": " is left to the model: it may be one token with what follows it.
        messages[-1] = replace(last, content=last.content.removesuffix(": "))
        return Written(messages=tuple(messages), reply_start=RETURN)
    call = f"{NAME}: {named}"
    if last.role == "assistant":
        lead = f"{last.content}\n" if last.content else ""
        messages[-1] = replace(last, content=lead + call)
    else:
        messages.append(Message("assistant", call))
    return Written(messages=tuple(messages), reply_start=call)


# -- reading -------------------------------------------------------------------------------------


def read(tape: Tape) -> Steps[None]:
    """Text, and calls in their lines."""
    if tape.start.endswith(RETURN):
        if (yield from tape.expect(":")):
            yield from tape.expect(" ")
    elif (named := tape.start.rfind(_NAME_MARK)) >= 0 and RESULT not in tape.start[named:]:
        tape.put_back(tape.start[named:])  # a call that the reply goes on with
    mark: str | None = None
    name = ""
    while True:
        markers = _ENDS[:1] if not name else _ENDS[:2]
        mark = yield from tape.until(markers if tape.may_call else (), tape.say)
        if mark is None:
            return
        unread: str | None = mark
        if mark == _NAME_MARK:
            name, unread = yield from _named_call(tape)
        else:
            unread = yield from read_arguments(tape, name, _ENDS)
            unread = None if unread is None else mark + unread
        if unread is not None:
            tape.say(unread)


def _named_call(tape: Tape) -> Steps[tuple[str, str | None]]:
    """The name behind its mark and the arguments; or the text that was taken."""
    taken: list[str] = []
    mark = yield from tape.until(_ENDS, taken.append)
    written = "".join(taken)
    name = tape.known_name(written.strip())
    is_name = 0 < len(name) <= _LONGEST_NAME and "\n" not in name
    if mark == _ARGUMENTS_MARK and is_name:
        unread = yield from read_arguments(tape, name, _ENDS)
        if unread is None:
            return name, None
        return "", _NAME_MARK + written + mark + unread
    tape.put_back(mark or "")
    cut_off = mark is None and tape.cut_off
    if name in tape.tools and not cut_off and not tape.schema(name).get("required"):
        tape.whole_call(name, "{}", repaired=True)
        return name, None
    return "", _NAME_MARK + written


def calls(grammar: CallGrammar) -> Calls:
    """Calls in their lines, the first one's name perhaps in the prompt already."""
    first = f"{literal(_NAME_MARK)} body"
    begin = f" {{name}}\n{_ARGUMENTS_MARK} "
    if _NAME_MARK in grammar.start.rpartition(RESULT)[2]:
        begin = f"\n{_ARGUMENTS_MARK} "
        first = "body"
    more = f"({literal(chr(10) + _NAME_MARK)} body)*" if grammar.several else ""
    often = "*" if grammar.several else "?"
    colon = '":"? " "?' if grammar.start.endswith(RETURN) else ""
    return Calls(
        must=f'must_call: {colon} {first} {more} ("\\n{RESULT}")?',
        may=f"may_call: (opened body){often} REST",
        rules=(
            *grammar.bodies(begin, ""),
            grammar.until("opened", _NAME_MARK),
            grammar.without("REST", _NAME_MARK),
        ),
    )


DIALECT = Dialect(name="qwen_fn", write=write, read=read, calls=calls, stops=(RESULT, RETURN))
