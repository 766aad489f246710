"""Beam search through the engine against transformers' `generate(num_beams=…)`.

Both models compute in fp64, so that no rounding decides between continuations that are near.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import QWEN3, make_pair

from fakes import ByteTokenizer
from qwenkit.api.beam import BeamSearch, BeamSettings, likeliest, step_requests
from qwenkit.engine.collector import Collector
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.models.spec import CausalModel
from qwenkit.types.completion import BeamCompletion
from qwenkit.types.sampling import SamplingParams

pytestmark = pytest.mark.oracle

VOCAB_SIZE = 211
TOKENS = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": QWEN3,
    "llama": {"model_type": "llama"},
}
SEARCHES: tuple[dict[str, Any], ...] = (
    {"width": 2},
    {"width": 5},
    {"width": 4, "length_penalty": 0.0},
    {"width": 4, "length_penalty": 2.0},
    {"width": 3, "length_penalty": -1.0},
    {"width": 4, "early_stopping": True},
    {"width": 3, "early_stopping": True, "length_penalty": 0.0},
)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, CausalModel]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small threads only wait for each other
    folder = tmp_path_factory.mktemp(request.param)
    theirs, ours = make_pair(VARIANTS[request.param], folder, std=0.45)
    ours = ours.double()
    ours.dtype = torch.float64
    theirs.generation_config.pad_token_id = 0
    yield theirs.double(), ours
    torch.set_num_threads(threads)


def ours_finds(
    model: CausalModel, prompt: list[int], stops: list[int], **given: Any
) -> list[BeamCompletion]:
    served = Engine(
        model,
        ByteTokenizer(),
        EngineSettings(block_tokens=4, kv_cache_tokens=2048),
        stop_token_ids=(),
        context_tokens=256,
    )
    search = BeamSearch(
        BeamSettings(max_tokens=TOKENS, **given),
        stop_ids={stop: stop for stop in stops},
        most=VOCAB_SIZE,
    )
    request = Request("prompt", tuple(prompt), SamplingParams(seed=0))
    while search.open:
        steps = step_requests(search, request)
        collectors = {step.id: Collector(step) for step in steps}
        for step in steps:
            served.add(step)
        while served.has_work:
            for event in served.step():
                collectors[event.request_id].add(event)
        search.advance([likeliest(collectors[step.id].completion()) for step in steps])
    return search.results(ByteTokenizer())


def theirs_finds(
    model: Any,
    prompt: list[int],
    stops: list[int],
    *,
    width: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> list[tuple[tuple[int, ...], float]]:
    model.generation_config.eos_token_id = stops or None
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = []
    for row, score in zip(output.sequences.tolist(), output.sequences_scores, strict=True):
        new = row[len(prompt) :]
        end = next((place + 1 for place, token in enumerate(new) if token in stops), len(new))
        answers.append((tuple(new[:end]), score.item()))
    return answers


@pytest.mark.parametrize("given", SEARCHES, ids=str)
def test_answers_and_scores_are_theirs(
    pair: tuple[Any, CausalModel], given: dict[str, Any]
) -> None:
    theirs, ours = pair
    generator = torch.Generator().manual_seed(5)
    ended = 0
    for length in (1, 6, 17):
        prompt = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        plain = ours_finds(ours, prompt, [], **given)
        assert all(len(beam.token_ids) == TOKENS for beam in plain)
        common = [beam.token_ids for beam in plain]
        for stops in ([], [common[0][3]], [common[0][5], common[-1][-2], common[-1][2]]):
            stops = sorted(set(stops))
            found = ours_finds(ours, prompt, stops, **given)
            expected = theirs_finds(theirs, prompt, stops, **given)
            assert [beam.token_ids for beam in found] == [ids for ids, _ in expected]
            scores = [score for _, score in expected]
            assert [beam.score for beam in found] == pytest.approx(scores, rel=1e-5)
            ended += sum(beam.finish_reason == "stop" for beam in found)
    assert ended >= 4 or given.get("length_penalty") == 2.0, "long answers win"
