"""An engine over the tiny model, requests for it, and reading of their events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fakes import EOS, ByteTokenizer, tiny_model
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.layers.attention import AttentionContext
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.sampling import SamplingParams

MODEL = tiny_model().double()  # so that rounding, which depends on the batch, decides nothing
MODEL.dtype = torch.float64


class Wrapped:
    """A model whose logits are changed, or which fails, on the way out."""

    def __init__(self, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.config, self.dtype = MODEL.config, MODEL.dtype
        self._change = change

    def __call__(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        return self._change(ids, MODEL(ids, context))


def engine(model: Any = MODEL, tokenizer: Any = None, **settings: Any) -> Engine:
    return Engine(
        model,
        tokenizer or ByteTokenizer(),
        EngineSettings(**{"block_tokens": 4, "kv_cache_tokens": 2048, **settings}),
        stop_token_ids=(EOS, 9999),
        context_tokens=256,
    )


def request(name: str, prompt: str | Iterable[int] = "prompt", **sampling: Any) -> Request:
    ids = prompt.encode() if isinstance(prompt, str) else prompt
    return Request(name, tuple(ids), SamplingParams.from_mapping({"temperature": 0, **sampling}))


def run(served: Engine, *requests: Request) -> dict[str, list[Event]]:
    """Serve all together and check that each ends once, with its finish event last."""
    for one in requests:
        served.add(one)
    events: dict[str, list[Event]] = {one.id: [] for one in requests}
    for _ in range(20_000):
        if not served.has_work:
            break
        for event in served.step():
            events[event.request_id].append(event)
    for one in requests:
        kinds = [type(event) for event in events[one.id]]
        assert kinds == [TokenEvent] * (len(kinds) - 1) + [FinishEvent]
        assert finish(events[one.id]).usage.prompt_tokens == len(one.prompt_ids)
        assert finish(events[one.id]).usage.completion_tokens == len(tokens(events[one.id]))
    status = served.status()
    assert (status.running, status.waiting) == (0, 0)
    assert status.free_blocks == status.total_blocks
    return events


def finish(events: list[Event]) -> FinishEvent:
    assert isinstance(events[-1], FinishEvent)
    return events[-1]


def tokens(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events)
