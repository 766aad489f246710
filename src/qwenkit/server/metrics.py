"""/metrics: counts and times for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from qwenkit.server.facts import Facts
from qwenkit.server.route import group
from qwenkit.server.served import Served

router = group()
_FIRST_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
# A label for each, so that no client can make up new ones.
_PATHS = frozenset(
    (
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
        *("/v1/models", "/tokenize", "/detokenize", "/health", "/ready", "/metrics", "/docs"),
        *("/openapi.json", "/api/chat", "/api/generate", "/api/tags", "/api/show"),
        *("/api/version", "/api/embed", "/api/ps"),
    )
)
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS"))
_GAUGES = {
    "running": "Answers that are being computed.",
    "waiting": "Answers that wait for a place in the engine.",
    "free_blocks": "Blocks of the cache of keys and values that are free.",
    "total_blocks": "All blocks of that cache.",
}
_COUNTERS = {
    "computed_tokens": "Tokens of prompts and answers that were computed.",
    "recomputed_tokens": "Those of them that were computed again after they had to make room.",
    "preemptions": "Answers that had to make room for others.",
    "cached_tokens": "Tokens of prompts that were in the cache already.",
    "drafted_tokens": "Tokens that were guessed ahead.",
    "accepted_tokens": "Those of them that stood.",
}


class _Engine(Collector):
    """What the engine says of itself, asked when somebody wants to know."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> Iterator[Any]:
        status = self._served.llm.status()
        for name, words in _GAUGES.items():
            gauge = GaugeMetricFamily(f"qwenkit_engine_{name}", words)
            gauge.add_metric([], getattr(status, name))
            yield gauge
        for name, words in _COUNTERS.items():
            counter = CounterMetricFamily(f"qwenkit_engine_{name}", words)
            counter.add_metric([], getattr(status, name))
            yield counter
        alive = GaugeMetricFamily("qwenkit_engine_alive", "1 while the engine lives.")
        alive.add_metric([], int(self._served.is_alive))
        yield alive
        answers = GaugeMetricFamily("qwenkit_answers", "Answers that are asked for at this moment.")
        answers.add_metric([], self._served.requests)
        yield answers


class Metrics:
    """The counts of one server."""

    def __init__(self, served: Served) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Engine(served))
        self._requests = Counter(
            "qwenkit_http_requests",
            "Requests by path, method and status.",
            ("path", "method", "status"),
            registry=registry,
        )
        self._tokens = Counter(
            "qwenkit_tokens",
            "Tokens of ended requests: of prompts, of prompts from the cache, of answers.",
            ("kind",),
            registry=registry,
        )
        self._finishes = Counter(
            "qwenkit_answers_ended", "Answers by why they ended.", ("reason",), registry=registry
        )
        self._first = Histogram(
            "qwenkit_first_token_seconds",
            "From a request to its first token.",
            buckets=_FIRST_S,
            registry=registry,
        )
        self._whole = Histogram(
            "qwenkit_request_seconds",
            "From a request for an answer to its end.",
            buckets=_WHOLE_S,
            registry=registry,
        )
        self._each = Histogram(
            "qwenkit_token_seconds",
            "From one token of a request to the next, in the mean.",
            buckets=_TOKEN_S,
            registry=registry,
        )

    def observe(self, facts: Facts) -> None:
        """Take note of a request that has ended."""
        path = facts.path if facts.path in _PATHS else "other"
        method = facts.method if facts.method in _METHODS else "other"
        self._requests.labels(path, method, str(facts.status or 499)).inc()
        if facts.first_token_s is None or facts.end_s is None:
            return
        self._tokens.labels("prompt").inc(facts.prompt_tokens)
        self._tokens.labels("cached").inc(facts.cached_tokens)
        self._tokens.labels("completion").inc(facts.completion_tokens)
        for reason in facts.finish:
            self._finishes.labels(reason).inc()
        self._first.observe(facts.first_token_s - facts.start_s)
        self._whole.observe(facts.end_s - facts.start_s)
        if facts.completion_tokens > 1:
            span_s = facts.end_s - facts.first_token_s
            self._each.observe(span_s / (facts.completion_tokens - 1))

    def text(self) -> bytes:
        """All of them in Prometheus's format."""
        return generate_latest(self._registry)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Counts and times for Prometheus.",
)
async def metrics(request: Request) -> Response:
    """In Prometheus's text format."""
    kept: Metrics = request.app.state.metrics
    return Response(kept.text(), media_type=CONTENT_TYPE_LATEST)
