"""A loaded model that looks for needles, its positions extended as one rope says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwenkit.api import LLM
from qwenkit.bench.methods import METHODS, own_rotary, positioned
from qwenkit.engine.collector import Collector
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import QwenkitError, UsageError
from qwenkit.layers.position import Position
from qwenkit.record import context_limit
from qwenkit.types.extension import ROPE_MODES
from qwenkit.types.sampling import SamplingParams


class ModelReader:
    """Asks `llm`'s model, through its own chat template and an engine for sequences of up to
    `longest` tokens; a `needle.Reader`.

    `rope` is a name of METHODS. Raises UsageError when it does not reach that far, or has no rotary
    positions to extend.
    """

    def __init__(self, llm: LLM, rope: str, longest: int, *, reference: bool = False) -> None:
        self._llm = llm
        self._position = _position(llm, rope, longest)
        with positioned(llm.model, self._position):
            self._engine = Engine(
                llm.model,
                llm.tokenizer,
                EngineSettings(reference_ops=reference, prefix_cache=not reference),
                stop_token_ids=llm.record.stop_token_ids,
                context_tokens=longest,
                trained_tokens=llm.record.trained_context_tokens,
                rope=METHODS[rope].mode,
            )

    def render(self, message: str) -> Sequence[int]:
        """See `Reader.render`."""
        return self._llm.render([{"role": "user", "content": message}]).ids

    def answer(
        self, ids: Sequence[int], *, max_tokens: int, progress: Callable[[float], None]
    ) -> tuple[str, str]:
        """See `Reader.answer`. Greedy and without penalties, which punish copying."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0)
        request = Request("needle", tuple(ids), sampling)
        collector = Collector(request)
        before = self._tokens_done()
        with positioned(self._llm.model, self._position):
            self._engine.add(request)
            while self._engine.has_work:
                for event in self._engine.step():
                    collector.add(event)
                progress((self._tokens_done() - before) / (len(ids) + max_tokens))
        completion = collector.completion()
        if completion.error is not None:
            raise QwenkitError(f"the model failed at {len(ids)} tokens: {completion.error}")
        extension = completion.usage.extension
        return completion.text, f"{extension.method} {extension.factor:g}"

    def _tokens_done(self) -> int:
        """Tokens that were computed, or found computed: haystacks of one text begin the same."""
        status = self._engine.status()
        return status.computed_tokens + status.cached_tokens


def _position(llm: LLM, rope: str, longest: int) -> Position:
    if rope not in ROPE_MODES:
        own = own_rotary(llm.config, llm.record.name)
        return METHODS[rope].position(own, llm.record.trained_context_tokens)
    try:
        context_limit(llm.record, llm.config, longest, METHODS[rope].mode)
    except UsageError as error:
        raise UsageError(f"length: {str(error).partition(': ')[2]}") from error
    return llm.config.position
