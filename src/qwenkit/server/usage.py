"""Token counts as OpenAI's answers have them."""

from __future__ import annotations

from typing import Any

from qwenkit.server.facts import Facts


def usage_of(facts: Facts) -> dict[str, Any]:
    """The counts of all answers to a request; a prompt they have in common counts once."""
    return {
        "prompt_tokens": facts.prompt_tokens,
        "completion_tokens": facts.completion_tokens,
        "total_tokens": facts.prompt_tokens + facts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": facts.cached_tokens},
    }
