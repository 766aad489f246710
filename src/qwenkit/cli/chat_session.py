"""A conversation as plain Python: its turns, its settings, what of it the model still sees.

Knows no terminal: `chat_terminal` shows what happens here, `chat_commands` changes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwenkit.cli.reply import Reply
from qwenkit.errors import RequestError
from qwenkit.types.events import Event, FinishReason
from qwenkit.types.messages import Message
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams

_REPLY_ROOM_TOKENS = 512  # kept free for the reply when the settings name no length


class RenderedPrompt(Protocol):
    """What a conversation reads of `qwenkit.chat.render.Rendered`."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def dropped_messages(self) -> int: ...


class ChatModel(Protocol):
    """What a conversation needs of `qwenkit.api.LLM`."""

    @property
    def record(self) -> ModelRecord: ...

    @property
    def context_tokens(self) -> int: ...

    def render(
        self, messages: Sequence[Message], *, continue_final_message: bool = False
    ) -> RenderedPrompt: ...

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        continue_final_message: bool = False,
    ) -> Iterator[Event]: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what was answered; `ended` "abort" means that the user stopped the answer."""

    question: str
    answer: str
    ended: FinishReason


class ChatSession:
    """One conversation with one model.

    `system` None leaves the template's own default system prompt, "" empties it. `sampling` is what
    every reply uses; `reset_sampling` returns it to what it was at the start. Raises UsageError for
    a base model, TemplateError for a template that cannot be used.
    """

    def __init__(
        self, model: ChatModel, *, sampling: SamplingParams, system: str | None = None
    ) -> None:
        model.render([Message("user", "hi")])  # refuses a base model now, not at the first question
        self.model = model
        self.sampling = sampling
        self.system = system
        self.turns: list[Turn] = []
        self.unseen_turns = 0  # so many of the oldest turns no longer fit and are not sent
        self._start_sampling = sampling
        self._window_dropped = 0

    def set_sampling(self, **changes: Any) -> None:
        """Change what the following replies use. Raises RequestError."""
        self.sampling = self.sampling.replace(**changes)

    def reset_sampling(self) -> None:
        """Everything but the seed as at the start."""
        self.sampling = self._start_sampling.replace(seed=self.sampling.seed)

    @property
    def start_sampling(self) -> SamplingParams:
        """What the conversation began with."""
        return self._start_sampling

    def clear(self) -> None:
        """Forget every turn; the system prompt and the settings stay."""
        self.turns.clear()
        self.unseen_turns = 0
        self._window_dropped = 0

    def ask(self, question: str) -> Reply:
        """Begin the answer to a question.

        Raises RequestError (too long for the context) or TemplateError; nothing has changed then.
        """
        messages, notices = self._fit(self.turns, [Message("user", question)], continuing=False)
        events = self.model.stream_chat(messages, self.sampling)
        return Reply(question, events, notices=notices)

    def resume(self) -> Reply:
        """Go on with the last answer. Raises RequestError when there is none."""
        if not self.turns:
            raise RequestError("continue", "there is no answer yet that could go on.")
        last = self.turns[-1]
        tail = [Message("user", last.question), Message("assistant", last.answer)]
        messages, notices = self._fit(self.turns[:-1], tail, continuing=True)
        events = self.model.stream_chat(messages, self.sampling, continue_final_message=True)
        return Reply(last.question, events, continued=last.answer, notices=notices)

    def keep(self, reply: Reply, *, continued: bool = False) -> str | None:
        """Take a reply that has ended into the history; say so when it is not, or only in part."""
        if reply.ended == "error":
            detail = reply.finish.error if reply.finish else None
            return f"The reply failed and is not kept: {detail or 'no reason given'}."
        if reply.ended == "abort" and not reply.text:
            return "Stopped before the first word; the question is not kept."
        turn = Turn(reply.question, reply.text, reply.ended)
        if continued:
            self.turns[-1] = turn
        else:
            self.turns.append(turn)
        if reply.ended == "abort":
            return "What was said stays in the history; :continue goes on with it."
        if reply.ended == "length":
            return ":continue goes on with it; :conf max_tokens=N changes the limit."
        return None

    def _fit(
        self, turns: Sequence[Turn], tail: Sequence[Message], *, continuing: bool
    ) -> tuple[list[Message], tuple[str, ...]]:
        """The messages to send: the oldest turns are left out until a reply has room."""
        context = self.model.context_tokens
        reply_room = min(self.sampling.max_tokens or _REPLY_ROOM_TOKENS, context // 4)
        unseen = min(self.unseen_turns, len(turns))
        while True:
            messages = [*self._head(), *_as_messages(turns[unseen:]), *tail]
            rendered = self.model.render(messages, continue_final_message=continuing)
            length = len(rendered.ids)
            if length <= context - reply_room or unseen == len(turns):
                break
            unseen += 1
        if length >= context:
            raise RequestError(
                "message",
                f"it has {length} tokens with its template, the context only {context}. "
                + self._remedy(context),
            )
        return messages, self._report(unseen, rendered.dropped_messages)

    def _remedy(self, context_tokens: int) -> str:
        longest = self.model.record.context_tokens
        if context_tokens < longest:
            return f"Allow a longer context (--context, up to {longest}), or shorten it."
        return "Shorten it."

    def _head(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    def _report(self, unseen: int, window_dropped: int) -> tuple[str, ...]:
        """What is newly left out, and by which limit."""
        notices = []
        if unseen > self.unseen_turns:
            count = 2 * (unseen - self.unseen_turns)
            limit = f"the context of {self.model.context_tokens} tokens is full"
            notices.append(f"Not sent any more: {_oldest(count)}; {limit}.")
        if window_dropped > self._window_dropped:
            window = self.model.record.history_window_tokens
            limit = f"beyond the model's history window of {window} tokens"
            notices.append(f"Not sent any more: {_oldest(window_dropped)}; {limit}.")
        self.unseen_turns = unseen
        self._window_dropped = window_dropped
        return tuple(notices)


def _oldest(count: int) -> str:
    return "the oldest message" if count == 1 else f"the {count} oldest messages"


def _as_messages(turns: Sequence[Turn]) -> Iterator[Message]:
    for turn in turns:
        yield Message("user", turn.question)
        yield Message("assistant", turn.answer)
