"""The line editor of `qwenkit chat`: several lines, paste, and a history that outlives the program.

Imported only when a person types: prompt_toolkit takes a tenth of a second.
"""

from __future__ import annotations

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from qwenkit.cli import console

PROMPT = "User> "


class PromptReader:
    """Reads one message at a time from the terminal.

    Enter sends; Alt-Enter, or Enter after a backslash, begins the next line of the same message.
    A pasted text is one message however many lines it has.
    """

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=_open_history(history_file()),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="....> ",
        )

    def read(self) -> str:
        """The next message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
        return self._session.prompt()


def history_file() -> Path:
    """Where earlier messages are kept: the XDG state folder (XDG Base Directory Specification)."""
    state = os.environ.get("XDG_STATE_HOME")
    folder = Path(state) if state else Path.home() / ".local" / "state"
    return folder / "qwenkit" / "chat_history"


def _open_history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # what people write to a model is nobody else's business
        with path.open("ab"):
            pass
    except OSError as error:
        console.note(f"Messages are not remembered after this session: {error}")
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # Enter in the Ctrl-R search keeps its own meaning

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
