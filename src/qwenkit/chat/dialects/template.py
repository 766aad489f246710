"""Whatever a checkpoint's own template makes of tools; replies are text, for only it knows more."""

from __future__ import annotations

from qwenkit.chat.dialects.spec import Conversation, Dialect, Written
from qwenkit.chat.parse import plain


def write(conversation: Conversation) -> Written:
    """Everything is left to the template."""
    return Written(messages=conversation.messages, tools=conversation.tools)


DIALECT = Dialect(name="template", write=write, read=plain)
