"""A model in plain Python, for the commands: it answers from a script."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest

from qwenkit.cli.options import ModelOptions
from qwenkit.errors import RequestError, UsageError
from qwenkit.types.events import Event, FinishEvent, FinishReason, TokenEvent, Usage
from qwenkit.types.messages import Message
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams


@dataclass
class ScriptedModel:
    """Every reply is `script`; one token per item, "^C" presses Ctrl-C. A character of a message is
    a prompt token.
    """

    script: Sequence[str] = ("Hel", "lo", ".")
    reason: FinishReason = "stop"
    error: str | None = None
    context_tokens: int = 1000
    window_tokens: int | None = None
    chat_format: str = "template"
    defaults: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.2))
    sent: list[tuple[Message, ...]] = field(default_factory=list)
    used: list[SamplingParams] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    continued: list[bool] = field(default_factory=list)
    open_streams: int = 0

    @property
    def record(self) -> ModelRecord:
        return ModelRecord(
            name="Scripted-Chat",
            model_type="llama",
            chat_format=self.chat_format,  # type: ignore[arg-type]
            context_tokens=self.context_tokens,
            trained_context_tokens=self.context_tokens,
            stop_token_ids=(2,),
            vocab_size=100,
            vocab_rows=100,
            sampling=self.defaults,
            history_window_tokens=self.window_tokens,
        )

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(token_bytes=lambda i: {1: b"one", 2: b"\xe6\x96"}[i])

    def render(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> Any:
        if self.chat_format == "raw":
            raise UsageError("a base model")
        kept, dropped = list(messages), 0
        while self.window_tokens and sum(len(m.content) for m in kept) > self.window_tokens:
            kept.pop(0)
            dropped += 1
        ids = tuple(ord(c) for m in kept for c in m.content)
        return SimpleNamespace(ids=ids, dropped_messages=dropped)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        continue_final_message: bool = False,
    ) -> Iterator[Event]:
        self.sent.append(tuple(messages))
        self.used.append(sampling)
        self.continued.append(continue_final_message)
        return self._events()

    def stream(self, prompt: str, sampling: SamplingParams) -> Iterator[Event]:
        if len(prompt) >= self.context_tokens:
            raise RequestError("prompt", "too long")
        self.prompts.append(prompt)
        self.used.append(sampling)
        return self._events()

    def _events(self) -> Iterator[Event]:
        self.open_streams += 1
        try:
            for number, text in enumerate(self.script):
                if text == "^C":
                    os.kill(os.getpid(), signal.SIGINT)
                yield TokenEvent("r", number, text)
            usage = Usage(prompt_tokens=5, completion_tokens=len(self.script))
            yield FinishEvent("r", self.reason, "", usage, error=self.error)
        finally:
            self.open_streams -= 1

    def __enter__(self) -> ScriptedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
def loaded(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Lets the commands open the scripted model; holds what they asked to load."""
    calls: list[dict[str, Any]] = []

    def load_model(name: str, given: ModelOptions) -> ScriptedModel:
        calls.append({"name": name, **asdict(given)})
        return model

    monkeypatch.setattr("qwenkit.cli.loading.load_model", load_model)
    return calls
