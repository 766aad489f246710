"""LLM and AsyncLLM on a tiny checkpoint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from qwenkit import LLM, AsyncLLM, SamplingParams
from qwenkit.engine.kv import KVCache
from qwenkit.errors import ModelNotFoundError, RequestError, UsageError
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.layers.attention import PackedCausal
from qwenkit.types.events import FinishEvent, TokenEvent
from qwenkit.types.extension import NO_EXTENSION, Extension
from tiny import IM_END, write_tiny_checkpoint

GREEDY = {"temperature": 0.0, "max_tokens": 8}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


def test_text_in_completion_out(llm: LLM) -> None:
    completion = llm.generate("abc", GREEDY)
    assert completion.prompt_token_ids == (97, 98, 99)
    assert completion.usage.completion_tokens == len(completion.token_ids) <= 8
    assert completion.finish_reason in ("length", "stop")
    assert completion.timing.total_s >= completion.timing.first_token_s > 0
    assert completion.logprobs is None


def test_a_list_is_answered_in_order_and_as_alone(llm: LLM) -> None:
    prompts = ["first", "the second one", "3"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY) for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert llm.generate([[97, 98]], GREEDY)[0].prompt_token_ids == (97, 98)
    assert llm.generate([], GREEDY) == []


def test_events_end_in_one_finish_event(llm: LLM) -> None:
    events = list(llm.stream("abc", GREEDY))
    assert all(isinstance(e, TokenEvent) for e in events[:-1])
    assert isinstance(events[-1], FinishEvent)
    text = "".join(e.text for e in events)
    assert text == llm.generate("abc", GREEDY).text


def test_chat_and_its_stream_agree(llm: LLM) -> None:
    sampling = {"seed": 5, "max_tokens": 12, "temperature": 1.0}
    completion = llm.chat(HELLO, sampling)
    assert completion.seed == 5
    assert "".join(e.text for e in llm.stream_chat(HELLO, sampling)) == completion.text
    assert completion.prompt_token_ids == llm.render(HELLO).ids


def test_a_drawn_seed_repeats_the_answer(llm: LLM) -> None:
    first = llm.generate("abc", {"temperature": 1.0, "max_tokens": 12})
    again = llm.generate("abc", {"temperature": 1.0, "max_tokens": 12, "seed": first.seed})
    assert again.token_ids == first.token_ids


def test_logprobs_are_reported_with_alternatives(llm: LLM) -> None:
    completion = llm.generate("abc", GREEDY | {"logprobs": 3})
    assert completion.logprobs is not None
    assert [p.token_id for p in completion.logprobs] == list(completion.token_ids)
    for entry in completion.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob), "greedy takes the most likely"


def test_continuing_the_assistants_turn(llm: LLM) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    completion = llm.chat(messages, GREEDY, continue_final_message=True)
    assert completion.prompt_token_ids[-4:] == tuple(b"I am")
    assert IM_END not in completion.prompt_token_ids[-5:]


def test_requests_that_cannot_be_served_name_the_field(llm: LLM) -> None:
    with pytest.raises(RequestError, match="'max_tokens'"):
        llm.generate("abc", {"max_token": 3})
    with pytest.raises(RequestError, match="sampling"):
        llm.generate("abc", 7)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="inside a list"):
        llm.generate([1, 2, 3], GREEDY)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="512"):
        llm.generate("x" * 600, GREEDY)
    with pytest.raises(RequestError, match="role"):
        llm.chat([{"role": "robot", "content": "x"}])
    with pytest.raises(RequestError, match="messages"):
        llm.chat([])


@pytest.mark.parametrize("prompts", [None, 5, b"hi", {"a": 1}, {"a"}, ["ok", 5], [None], [["x"]]])
def test_prompts_of_the_wrong_kind_are_our_errors(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    "sampling", [[], [{"max_tokens": 3}], "greedy", {1: 2}, {"stop": None}, {"stop": 5}]
)
def test_sampling_of_the_wrong_kind_is_our_error(llm: LLM, sampling: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling|stop"):
        llm.generate("abc", sampling)


def test_numbers_and_ids_of_numpy_are_taken(llm: LLM) -> None:
    sampling = {"max_tokens": numpy.int64(3), "temperature": numpy.float32(0)}
    expected = llm.generate("abc", {"max_tokens": 3, "temperature": 0}).token_ids
    assert llm.generate([numpy.array([97, 98, 99])], sampling)[0].token_ids == expected
    assert llm.generate([torch.tensor([97, 98, 99])], sampling)[0].token_ids == expected
    prompts: Any = iter(["abc"])
    assert [c.token_ids for c in llm.generate(prompts, sampling)] == [expected]


def test_one_stop_text_needs_no_list(llm: LLM) -> None:
    text = llm.generate("abc", {"max_tokens": 30, "temperature": 0, "ignore_eos": True}).text
    stop = text[3:5]
    stopped = llm.generate("abc", {"temperature": 0, "ignore_eos": True, "stop": stop})
    assert stopped.text == text[: text.index(stop)]
    assert stopped.matched_stop == stop


def test_an_explicit_sampling_is_used_as_it_is(llm: LLM) -> None:
    exact = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    assert len(llm.generate("abc", exact).token_ids) == 2


def test_constructor_arguments_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compute"):
        LLM(folder, compute="fast")
    with pytest.raises(UsageError, match="kv_dtype"):
        LLM(folder, kv_dtype="fp8")
    with pytest.raises(UsageError, match="threads"):
        LLM(folder, threads=0)
    with pytest.raises(UsageError, match="adapters: expected a mapping of names to paths, got 5"):
        LLM(folder, adapters=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"threads: got 100000; allowed: 1 to \d+"):
        LLM(folder, threads=100_000)
    with pytest.raises(UsageError, match=r"context_tokens: got 2049; .* allows 1 to 2048\.$"):
        LLM(folder, context_tokens=2049)
    with pytest.raises(UsageError, match=r"allows 1 to 512\. rope='per-request' reaches 2048"):
        LLM(folder, context_tokens=513, rope="as-config")
    with pytest.raises(UsageError, match=r"rope: got 'per-requst'\. Did you mean 'per-request'"):
        LLM(folder, rope="per-requst")
    with pytest.raises(ModelNotFoundError, match="default"):
        LLM("no/such-model", offline=True)


def test_a_context_that_no_memory_holds_is_refused_at_once(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 2**31 - 1, "head_dim": 2048}
    folder = write_tiny_checkpoint(tmp_path / "m", config=config)
    with pytest.raises(UsageError, match=r"tokens, as many .* GB, which cpu .*--context N\)\.$"):
        LLM(folder)
    with LLM(folder, context_tokens=64) as llm:
        assert llm.context_tokens == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": torch.float32}, r"dtype: got torch\.float32\. Give the text 'float32'\."),
        ({"dtype": 5}, r"dtype: got 5\. Allowed: auto, bfloat16, float16, float32\."),
        ({"dtype": None}, r"dtype: got None\. Allowed: auto"),
        ({"weights": None}, r"weights: got None\. Allowed: auto, bf16"),
        ({"weights": 5}, r"weights: got 5\. Allowed: auto, bf16"),
        ({"kv_dtype": None}, r"kv_dtype: got None\. Allowed: auto, bf16"),
        ({"kv_cache_tokens": "x"}, "kv_cache_tokens: expected a whole number"),
        ({"compute": None}, r"compute: got None\. Allowed: auto, reference\."),
        ({"context_tokens": "x"}, "context_tokens: expected a whole number of tokens, got 'x'"),
        ({"context_tokens": True}, "context_tokens: expected a whole number of tokens, got True"),
        ({"threads": True}, "threads: got True; allowed: 1 to"),
        ({"threads": "1"}, "threads: got '1'; allowed: 1 to"),
        ({"device_map": {1: "cpu"}}, "device_map: expected a module path as text, got 1"),
    ],
)
def test_arguments_of_the_wrong_kind_are_our_errors(
    folder: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(folder, **given)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, torch.float32),
        ({"weights": "fp32"}, torch.float32),
        ({"weights": "int4"}, torch.bfloat16),
        ({"weights": "int4", "compute": "reference"}, torch.float32),
        ({"weights": "int8", "kv_dtype": "fp32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"kv_dtype": "bf16"}, torch.bfloat16),
        ({"kv_dtype": "int8"}, torch.int8),
        ({"kv_dtype": "int4"}, torch.uint8),
        ({"kv_dtype": "int4", "weights": "int4"}, torch.uint8),
    ],
)
def test_keys_and_values_are_kept_as_asked_or_as_the_weights_allow(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], dtype: torch.dtype
) -> None:
    made = []
    make = KVCache.__init__

    def watched(self: KVCache, **sizes: Any) -> None:
        made.append(sizes["dtype"])
        make(self, **sizes)

    monkeypatch.setattr(KVCache, "__init__", watched)
    with LLM(folder, **given) as opened:
        if given == {"weights": "int4"} and not kv_write.backends:
            dtype = torch.float32  # no native kernels here
        assert made == [dtype]
        prompts = [[65, 66, 67, 68], [70, 71]]
        alone = [opened.generate([p], GREEDY)[0].token_ids for p in prompts]
        assert [c.token_ids for c in opened.generate(prompts, GREEDY)] == alone


def test_a_shorter_context_ends_the_answer(folder: Path) -> None:
    with LLM(folder, context_tokens=20) as llm:
        completion = llm.generate("abcdefgh", {"ignore_eos": True, "temperature": 0.0})
        assert completion.finish_reason == "length"
        assert len(completion.prompt_token_ids) + len(completion.token_ids) <= 20


def test_reference_compute_gives_the_same_tokens(folder: Path, llm: LLM) -> None:
    with LLM(folder, compute="reference") as reference:
        assert reference.generate("abc", GREEDY).token_ids == llm.generate("abc", GREEDY).token_ids


def test_async_answers_run_together(folder: Path, llm: LLM) -> None:
    async def run() -> None:
        async with AsyncLLM(folder) as model:
            prompts = ["abc", "another", "third"]
            answers = await asyncio.gather(*(model.generate(p, GREEDY) for p in prompts))
            assert [a.token_ids for a in answers] == [
                llm.generate(p, GREEDY).token_ids for p in prompts
            ]
            listed = await model.generate(prompts, GREEDY)
            assert [a.token_ids for a in listed] == [a.token_ids for a in answers]
            events = [event async for event in model.stream("abc", GREEDY)]
            assert isinstance(events[-1], FinishEvent)
            chat = await model.chat(HELLO, GREEDY)
            assert chat.text == llm.chat(HELLO, GREEDY).text
            streamed = [event.text async for event in model.stream_chat(HELLO, GREEDY)]
            assert "".join(streamed) == chat.text

    asyncio.run(run())


def test_async_answers_of_one_call_end_together(folder: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(folder) as model:
            endless = {"max_tokens": 500, "ignore_eos": True}
            with pytest.raises(RequestError, match="token id 9999"):
                await model.generate([[1], [2], [9999]], endless)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=20)
            assert all(task.cancelled() for task in tasks)
            await asyncio.to_thread(model._service.call, lambda _: None)
            assert not model._service.engine.has_work

    asyncio.run(run())


def test_closing_does_not_hold_up_the_event_loop(folder: Path) -> None:
    async def run() -> None:
        model, opened = AsyncLLM(folder), threading.Event()
        step = model._service._worker.call(lambda _: opened.wait(20))
        asyncio.get_running_loop().call_later(0.1, opened.set)
        await model.close()
        assert step.result(), "the loop went on while the engine was busy"

    asyncio.run(run())


def test_a_stream_is_typed_as_what_can_be_closed(folder: Path, llm: LLM) -> None:
    endless = {"max_tokens": 500, "ignore_eos": True}
    with llm.stream("abc", endless) as events:
        next(events)
    llm.stream_chat(HELLO, endless).close()

    async def run() -> None:
        async with AsyncLLM(folder) as model, model.stream("abc", endless) as events:
            await anext(events)
            await model.stream_chat(HELLO, endless).aclose()

    asyncio.run(run())


def test_the_status_tells_how_much_was_found_in_the_cache(folder: Path) -> None:
    with LLM(folder) as model:
        assert model.status().prefix_hit_rate == 0
        first, second = (model.generate([[7] * 41], GREEDY)[0] for _ in range(2))
        assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 32)
        status = model.status()
        assert (status.prompt_tokens, status.cached_tokens) == (82, 32)
        assert status.prefix_hit_rate == 32 / 82
        assert (status.running, status.waiting) == (0, 0)
        assert status.free_blocks == status.total_blocks


def test_texts_become_vectors(llm: LLM) -> None:
    prompts = ["first", "a second text that is longer", "3"]
    for pooling in ("last", "mean"):
        together = llm.embed(prompts, pooling=pooling)
        assert together.shape == (3, llm.config.hidden_size)
        assert together.dtype == numpy.float32
        assert numpy.linalg.norm(together, axis=1) == pytest.approx([1, 1, 1], abs=1e-6)
        for prompt, vector in zip(prompts, together, strict=True):
            assert numpy.array_equal(llm.embed(prompt, pooling=pooling)[0], vector)
            assert numpy.array_equal(llm.embed([list(prompt.encode())], pooling=pooling)[0], vector)
    context = PackedCausal([5])
    with torch.inference_mode():
        hidden = llm.model.hidden(torch.tensor(list(b"first")), context)
    plain = llm.embed("first", pooling="mean", normalize=False)
    assert plain[0] == pytest.approx(hidden.mean(0).numpy(), abs=1e-4)
    assert llm.embed([]).shape == (0, llm.config.hidden_size)
    with pytest.raises(RequestError, match=r"pooling: got 'max'"):
        llm.embed("a", pooling="max")
    with pytest.raises(RequestError, match="prompt_ids: the prompt is empty"):
        llm.embed("")


def test_async_vectors_are_the_same(folder: Path, llm: LLM) -> None:
    async def run() -> None:
        async with AsyncLLM(folder) as model:
            prompts = ["abc", "another"]
            vectors, answer = await asyncio.gather(
                model.embed(prompts, options={"client": "a"}), model.generate("abc", GREEDY)
            )
            assert numpy.array_equal(vectors, llm.embed(prompts))
            assert answer.token_ids == llm.generate("abc", GREEDY).token_ids

    asyncio.run(run())


def test_a_context_beyond_the_trained_one_extends_what_needs_it(folder: Path) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    with LLM(folder, context_tokens=1024) as longer, LLM(folder) as plain:
        assert (longer.context_tokens, plain.context_tokens) == (1024, 512)
        short, long = longer.generate(["abc", "abc" * 200], sampling)
        assert short.usage.extension == NO_EXTENSION
        assert long.usage.extension == Extension("yarn", 2.0, 512)
        assert short.token_ids == plain.generate("abc", sampling).token_ids
        with pytest.raises(RequestError, match=r"600 tokens, the context 512.*--context"):
            plain.generate("abc" * 200, sampling)
