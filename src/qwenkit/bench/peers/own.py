"""qwenkit, through the doors its users take."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from qwenkit.bench.peers.spec import Arrival, Load, Options, prompt_ids


class Qwenkit:
    """`LLM.generate` with ids, greedy; under a load `AsyncLLM.stream`."""

    def __init__(self, model: str, options: Options) -> None:
        import qwenkit

        self.version = qwenkit.__version__
        weights = options.weights
        given: dict[str, Any] = {"compute": options.compute}
        if weights is not None:
            given["weights"] = weights.name
            if weights.name in ("int4", "int8"):
                given["group_size"] = weights.group_size
            if weights.head is not None:
                given["head_weights"] = weights.head
        self.setting = "as stored" if weights is None else weights.label
        self._params = qwenkit.SamplingParams
        kind: Any = qwenkit.AsyncLLM if options.serves else qwenkit.LLM
        self._llm = kind(model, threads=options.threads, **given)
        self._vocab_size = self._llm.tokenizer.vocab_size

    def _sampling(self, tokens: int) -> Any:
        return self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)

    def _run(self, prompt_tokens: int, tokens: int, streams: int) -> list[Any]:
        prompts = [prompt_ids(prompt_tokens, self._vocab_size, i) for i in range(streams)]
        done = self._llm.generate(prompts, self._sampling(tokens), options=_unshared())
        return [completion.timing for completion in done]

    def prefill(self, tokens: int) -> float:
        """Until the first token is there."""
        return float(self._run(tokens, 1, 1)[0].first_token_s)

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """From the last stream's first token to the last token of all."""
        timings = self._run(context, tokens + 1, streams)
        first_s = max(timing.first_token_s for timing in timings)
        return float(max(timing.total_s for timing in timings) - first_s)

    def play(self, load: Load) -> list[list[float]]:
        """Each request a task of one event loop, its times those at which the task has a token."""
        return asyncio.run(self._play(load))

    async def _play(self, load: Load) -> list[list[float]]:
        start_s, options = time.perf_counter(), _unshared()
        room = asyncio.Semaphore(load.at_most or len(load.arrivals))

        async def ask(number: int, arrival: Arrival) -> list[float]:
            await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - start_s)))
            ids = prompt_ids(arrival.prompt_tokens, self._vocab_size, number)
            times = []
            async with room:
                async for event in self._llm.stream(
                    ids, self._sampling(arrival.tokens), options=options
                ):
                    if hasattr(event, "token_id"):
                        times.append(time.perf_counter() - start_s)
            return times

        tasks = [ask(number, arrival) for number, arrival in enumerate(load.arrivals)]
        return list(await asyncio.gather(*tasks))


def _unshared() -> dict[str, str]:
    """So that nothing an earlier measurement computed is found in the prefix cache."""
    return {"cache_salt": secrets.token_hex(8)}
