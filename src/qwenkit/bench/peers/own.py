"""qwenkit, through the door its users take."""

from __future__ import annotations

from typing import Any

from qwenkit.bench.peers.spec import Options, prompt_ids


class Qwenkit:
    """`LLM.generate` with ids, greedy."""

    def __init__(self, model: str, options: Options) -> None:
        import qwenkit
        from qwenkit import LLM, SamplingParams

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
        self._params = SamplingParams
        self._llm = LLM(model, threads=options.threads, **given)
        self._vocab_size = self._llm.tokenizer.vocab_size

    def _run(self, prompt_tokens: int, tokens: int, streams: int) -> list[Any]:
        sampling = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)
        prompts = [prompt_ids(prompt_tokens, self._vocab_size, i) for i in range(streams)]
        return [completion.timing for completion in self._llm.generate(prompts, sampling)]

    def prefill(self, tokens: int) -> float:
        """Until the first token is there."""
        return float(self._run(tokens, 1, 1)[0].first_token_s)

    def decode(self, tokens: int, streams: int, context: int) -> float:
        """From the last stream's first token to the last token of all."""
        timings = self._run(context, tokens + 1, streams)
        first_s = max(timing.first_token_s for timing in timings)
        return float(max(timing.total_s for timing in timings) - first_s)
