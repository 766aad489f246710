"""The commands of a conversation: a line that starts with ":" and what it does to the session.

The names are those of the first generation's command-line demo, so that its users feel at home.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from qwenkit.cli.chat_session import ChatSession
from qwenkit.cli.settings import parse_setting
from qwenkit.errors import RequestError, UsageError, suggest

Action = Literal["nothing", "exit", "clear screen", "continue"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to show, and what the terminal should do."""

    text: str = ""
    action: Action = "nothing"


@dataclass(frozen=True, slots=True)
class Command:
    """One command: all its names (the first is the full one) and its help in two languages."""

    names: tuple[str, ...]
    argument: str
    english: str
    chinese: str
    run: Callable[[ChatSession, str], Outcome]


def is_command(line: str) -> bool:
    """True for ":" alone or with a letter, at the very start; ":)" and a line after a space are
    messages.
    """
    if line.rstrip() == ":":
        return True
    return len(line) > 1 and line[0] == ":" and line[1].isascii() and line[1].isalpha()


def run_command(session: ChatSession, line: str) -> Outcome:
    """Do what the line says.

    Raises UsageError for an unknown command, naming the nearest, and RequestError for a value that
    cannot be used.
    """
    name, _, argument = line.strip()[1:].partition(" ")
    command = _BY_NAME.get(name.lower())
    if command is None:
        raise UsageError(f"No command :{name}. {suggest(name, _BY_NAME)} :help lists them.")
    if argument.strip() and not command.argument:
        raise UsageError(f":{name} takes no argument, got {argument.strip()!r}.")
    return command.run(session, argument.strip())


def _help(session: ChatSession, argument: str) -> Outcome:
    lines = ["Commands / 命令:"]
    for command in COMMANDS:
        usage = " ".join(f":{name}" for name in command.names)
        usage = f"{usage} {command.argument}".rstrip()
        lines.append(f"  {usage:<28} {command.english} / {command.chinese}")
    lines.append("Keys / 按键:")
    lines += [f"  {key:<28} {meaning}" for key, meaning in _KEYS]
    return Outcome("\n".join(lines))


def _exit(session: ChatSession, argument: str) -> Outcome:
    return Outcome(action="exit")


def _clear(session: ChatSession, argument: str) -> Outcome:
    return Outcome(action="clear screen")


def _clear_history(session: ChatSession, argument: str) -> Outcome:
    count = len(session.turns)
    session.clear()
    return Outcome(f"History cleared ({count} turn{'' if count == 1 else 's'}). / 已清除历史。")


def _history(session: ChatSession, argument: str) -> Outcome:
    lines = [] if session.system is None else [f"[system] {session.system}"]
    for number, turn in enumerate(session.turns, start=1):
        unseen = " (no longer sent)" if number <= session.unseen_turns else ""
        mark = _END_MARKS.get(turn.ended, "")
        lines.append(f"[{number}]{unseen} User: {turn.question}")
        lines.append(f"[{number}]{unseen} {session.model.record.name}: {turn.answer}{mark}")
    return Outcome("\n".join(lines) or "No history yet. / 暂无历史。")


def _seed(session: ChatSession, argument: str) -> Outcome:
    if argument:
        session.set_sampling(seed=parse_setting("seed", argument))
    seed = session.sampling.seed
    return Outcome(f"seed = {'none (new at every reply)' if seed is None else seed}")


def _configure(session: ChatSession, argument: str) -> Outcome:
    if not argument:
        return Outcome(_settings(session))
    name, equals, text = (part.strip() for part in argument.partition("="))
    if not equals or not name:
        raise RequestError(name or "conf", "write name=value, for example :conf temperature=0.7")
    session.set_sampling(**{name: parse_setting(name, text)})
    return Outcome(f"{name} = {_show(getattr(session.sampling, name))}")


def _system(session: ChatSession, argument: str) -> Outcome:
    if argument:
        session.system = "" if argument == '""' else argument
    if session.system is None:
        return Outcome("system = the model's own / 使用模型默认设定")
    return Outcome(f"system = {_show(session.system)}")


def _reset(session: ChatSession, argument: str) -> Outcome:
    session.reset_sampling()
    return Outcome(_settings(session))


def _continue(session: ChatSession, argument: str) -> Outcome:
    return Outcome(action="continue")


def _settings(session: ChatSession) -> str:
    """The settings of generation; a star marks what differs from the start.

    Those for programs are listed only where they differ.
    """
    lines = []
    for field in dataclasses.fields(session.sampling):
        value = getattr(session.sampling, field.name)
        changed = value != getattr(session.start_sampling, field.name)
        if field.name in _FOR_PROGRAMS and not changed:
            continue
        lines.append(f"{'*' if changed else ' '} {field.name} = {_show(value)}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    """As `:conf` reads it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, ensure_ascii=False) if value is not None else "none"


_FOR_PROGRAMS = ("stop_token_sequences", "ignore_eos", "logprobs", "prompt_logprobs", "logit_bias")
_END_MARKS = {
    "abort": " [stopped / 已中断]",
    "length": " [cut at the token limit / 达到长度上限]",
    "language": " [ended before another script / 出现不允许的文字]",
    "loop": " [ended in a loop / 陷入重复]",
}
_KEYS = (
    ("Ctrl-C", "stop the reply, or empty the line / 中断回答或清空输入"),
    ("Ctrl-D", "leave / 退出"),
    ("Alt-Enter, or \\ at the end", "next line of the same message / 换行继续输入"),
    ("Up, Down, Ctrl-R", "earlier messages / 输入历史"),
    ("a space before ':'", "a message that starts with ':' / 以 ':' 开头的消息"),
)
COMMANDS = (
    Command(("help", "h"), "", "this list", "显示帮助", _help),
    Command(("exit", "quit", "q"), "", "leave", "退出", _exit),
    Command(("clear", "cl"), "", "clear the screen", "清屏", _clear),
    Command(("clear-his", "clh"), "", "forget the conversation", "清除对话历史", _clear_history),
    Command(("history", "his"), "", "show the conversation", "显示对话历史", _history),
    Command(("system",), "[TEXT]", "show or set the system prompt", "查看或设置系统提示", _system),
    Command(("seed",), "[N]", "show or set the seed", "查看或设置随机种子", _seed),
    Command(("conf",), "[k=v]", "show or set generation", "查看或修改生成设置", _configure),
    Command(("reset-conf",), "", "generation as at the start", "恢复生成设置", _reset),
    Command(("continue", "c"), "", "go on with the last reply", "继续上一条回答", _continue),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}
