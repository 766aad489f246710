"""The face of a conversation: reads lines, shows replies as they come, obeys Ctrl-C."""

from __future__ import annotations

from typing import Protocol

from qwenkit import __version__
from qwenkit.cli import console
from qwenkit.cli.chat_commands import is_command, run_command
from qwenkit.cli.chat_session import ChatSession
from qwenkit.cli.options import DEFAULT_MODEL
from qwenkit.cli.reply import Reply, show_reply
from qwenkit.errors import QwenkitError
from qwenkit.types.record import ModelRecord


class LineReader(Protocol):
    """Where messages come from; see `chat_input.PromptReader`."""

    def read(self) -> str: ...


def welcome(record: ModelRecord, model_name: str, context_tokens: int) -> str:
    """Who speaks, and how to go on, in English and Chinese."""
    kind = record.quantization or record.stored_dtype or "unknown type"
    lines = [f"qwenkit {__version__} · {record.name} · {kind} · {context_tokens} tokens context"]
    if model_name == DEFAULT_MODEL:
        lines += [
            "Speaking is the embedded default model, SmolLM2-135M-Instruct. It is not a Qwen, it "
            "is very small and speaks mainly English.",
            "当前为内置默认模型 SmolLM2-135M-Instruct：不是通义千问，规模很小，主要使用英语。",
        ]
    elif record.model_type.startswith("qwen"):
        lines += [f"Speaking is {record.name}.", f"当前模型：{record.name}。"]
    else:
        lines += [
            f"Speaking is {record.name}, which is not a Qwen.",
            f"当前模型：{record.name}，不是通义千问。",
        ]
    return "\n".join(
        [
            *lines,
            "Type a message. :help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.",
            "请输入消息。:help 查看命令，Ctrl-C 中断回答，Ctrl-D 退出。",
        ]
    )


def converse(session: ChatSession, reader: LineReader) -> None:
    """Talk until the reader ends or `:exit` is given. An error ends a reply, not the talk."""
    while True:
        try:
            line = reader.read()
        except KeyboardInterrupt:
            console.note("Ctrl-D or :exit leaves. / 按 Ctrl-D 或输入 :exit 退出。")
            continue
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            if not _respond(session, line):
                return
        except KeyboardInterrupt:
            console.note("Stopped. / 已中断。")
        except QwenkitError as error:
            console.error(str(error))


def _respond(session: ChatSession, line: str) -> bool:
    """Obey or answer one line; False when it asked to leave."""
    if not is_command(line):
        _show(session, session.ask(line), continued=False)
        return True
    outcome = run_command(session, line)
    if outcome.text:
        console.say(outcome.text)
    if outcome.action == "clear screen":
        console.clear_screen()
    if outcome.action == "continue":
        _show(session, session.resume(), continued=True)
    return outcome.action != "exit"


def _show(session: ChatSession, reply: Reply, *, continued: bool) -> None:
    show_reply(reply, label=f"{session.model.record.name}> ")
    remark = session.keep(reply, continued=continued)
    if remark:
        console.note(remark)
