"""CrewAI: a crew whose agent calls a tool, its usage, the model alone, streamed, and a class."""

from __future__ import annotations

from typing import Any

from crewai import LLM
from pydantic import BaseModel
from replies import ANSWER, CITY, GREETING


class City(BaseModel):
    name: str
    country: str


def check(shown: dict[str, Any], url: str) -> None:
    assert shown["answer"] == ANSWER
    assert shown["asked"] == ["Paris"]
    usage = shown["crew"].usage_metrics
    assert usage.successful_requests == 2
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    assert shown["model"].call("Hello!") == GREETING
    streaming = LLM(model="hosted_vllm/default", base_url=f"{url}/v1", api_key="none", stream=True)
    assert streaming.call("Hello!") == GREETING
    told = shown["model"].call("Which city has the Eiffel Tower?", response_model=City)
    assert (told if isinstance(told, City) else City.model_validate_json(told)) == City(**CITY)
