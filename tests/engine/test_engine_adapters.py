"""Adapters of single requests: each has what it has alone, whoever is in the batch; loaded and
unloaded while others run.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, engine

from adapters_made import write_made_adapter
from qwenkit import LLM, AsyncLLM
from qwenkit.adapter_files import read_adapter
from qwenkit.engine.engine import EngineSettings
from qwenkit.engine.replay import Replayer
from qwenkit.errors import CheckpointError, RequestError, UsageError
from qwenkit.kernels.ops.add_low_rank import add_low_rank
from qwenkit.load import load
from qwenkit.types.completion import Completion
from qwenkit.types.events import Event, FinishEvent
from tiny import write_tiny_checkpoint

SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "logprobs": 2}
PROMPTS = [[65 + i, *range(70, 76 + 5 * i)] for i in range(8)]
NAMES = [None, "a", "b", None, "c", "a", "a", "b"]
MIXTURE = {
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
Files = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module", params=[{}, MIXTURE], ids=["dense", "mixture"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model and three adapters of different ranks and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    path = write_tiny_checkpoint(folder / "m", config={"intermediate_size": 64} | request.param)
    model = load(path).model
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["shared_expert.down_proj"] if request.param else ["gate_proj", "up_proj", "down_proj"]
    adapters = {
        "a": write_made_adapter(folder / "a", model, targets=attention, rank=4, seed=1),
        "b": write_made_adapter(folder / "b", model, targets=["q_proj"], rank=3, seed=2),
        "c": write_made_adapter(
            folder / "c", model, targets=[*attention, "lm_head"], rank=17, seed=3
        ),
    }
    if not request.param:
        adapters["b"] = write_made_adapter(folder / "b2", model, targets=mlp, rank=3, seed=2)
    return path, adapters


def complete(llm: LLM, which: list[int], names: list[str | None] = NAMES) -> list[Any]:
    requests = [llm._request(PROMPTS[i], SAMPLING, {"adapter": names[i]}) for i in which]
    return [told(c) for c in llm._complete(requests)]


def told(completion: Completion) -> Any:
    assert completion.finish_reason == "length", completion.error
    return completion.token_ids, completion.logprobs


@pytest.fixture(params=["auto", "int4", "int8", "bf16"])
def llm(request: pytest.FixtureRequest, files: Files) -> Iterator[LLM]:
    with LLM(files[0], weights=request.param, adapters=files[1]) as opened:
        if not add_low_rank.backends:
            pytest.skip("no native kernels here")
        yield opened


def test_a_mixed_batch_gives_each_the_bits_that_it_has_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [complete(llm, [i])[0] for i in range(8)]
    assert complete(llm, list(range(8))) == alone
    assert complete(llm, [5, 0, 2, 4]) == [alone[i] for i in (5, 0, 2, 4)]
    plain = [complete(llm, [i], [None] * 8)[0] for i in range(8)]
    for i, name in enumerate(NAMES):
        assert (alone[i] == plain[i]) == (name is None)
    monkeypatch.setattr(Replayer, "run", lambda *_: None)
    assert complete(llm, list(range(8))) == alone


def test_decoding_steps_with_adapters_are_repeated_in_native_code(llm: LLM) -> None:
    before = complete(llm, [1, 3])
    replayer = llm._service.engine._runner._adapted_replayer
    assert replayer is not None
    assert not replayer._refused
    assert replayer._steps
    assert complete(llm, [1, 3]) == before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_chunks_threads_and_a_small_cache_change_no_bit(
    chunk: int, threads: int, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(files[0], weights="int8", adapters=files[1]) as whole:
        if not add_low_rank.backends:
            pytest.skip("no native kernels here")
        expected = [complete(whole, [i])[0] for i in range(8)]
    make = EngineSettings

    def small(**given: Any) -> EngineSettings:
        return make(**given, max_batch_tokens=chunk, max_sequences=8)

    monkeypatch.setattr("qwenkit.api.session.EngineSettings", small)
    before = torch.get_num_threads()
    with LLM(files[0], weights="int8", adapters=files[1], kv_cache_tokens=80) as crowded:
        try:
            crowded._service.call(lambda _: torch.set_num_threads(threads))
            assert complete(crowded, list(range(8))) == expected
            assert crowded._service.engine.status().preemptions > 0
        finally:
            crowded._service.call(lambda _: torch.set_num_threads(before))


def test_steps_without_adapters_run_the_model_itself(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(files[0]) as plain:
        expected = complete(plain, list(range(8)), [None] * 8)
    with LLM(files[0], adapters=files[1]) as llm:
        wrapped = llm._service.engine._runner.adapters.model
        monkeypatch.setattr(type(wrapped), "forward", _only(llm.model))
        assert complete(llm, list(range(8)), [None] * 8) == expected


def _only(allowed: Any) -> Any:
    forward = type(allowed).forward

    def run(self: Any, *arguments: Any) -> Any:
        assert self is allowed
        return forward(self, *arguments)

    return run


@pytest.mark.parametrize("compute", ["auto", "reference"])
def test_merged_into_the_weights_it_gives_the_same(compute: str, files: Files) -> None:
    with LLM(files[0], dtype="float32", compute=compute, adapters=files[1]) as beside:
        expected = complete(beside, [1], ["a"] * 8)[0]
        plain = complete(beside, [1], [None] * 8)[0]
    with LLM(files[0], dtype="float32", compute=compute, merge=files[1]["a"]) as merged:
        got = complete(merged, [1], [None] * 8)[0]
    assert got[0] == expected[0] != plain[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-4, abs=1e-4)


def test_loading_and_unloading_while_requests_run(files: Files) -> None:
    path, adapters = files
    with LLM(path, adapters={"a": adapters["a"]}) as llm:
        expected = {name: complete(llm, [1], [name] * 8)[0] for name in (None, "a")}
        done = threading.Event()
        failed: list[object] = []

        def ask(name: str | None) -> None:
            while not done.is_set():
                got = complete(llm, [1], [name] * 8)[0]
                if got != expected[name]:
                    failed.append((name, got))

        threads = [threading.Thread(target=ask, args=(n,)) for n in (None, "a", None)]
        for thread in threads:
            thread.start()
        keys = set()
        for _ in range(8):
            llm.load_adapter("b", adapters["b"])
            assert llm.adapters == ("a", "b")
            keys.add(llm._service.engine.adapter_key("b"))
            first = complete(llm, [2], ["b"] * 8)
            llm.unload_adapter("b")
            llm.load_adapter("b", adapters["c"])
            keys.add(llm._service.engine.adapter_key("b"))
            assert complete(llm, [2], ["b"] * 8) != first
            llm.unload_adapter("b")
        done.set()
        for thread in threads:
            thread.join(60)
        assert failed == []
        assert len(keys) == 16
        assert llm.adapters == ("a",)


def test_an_adapter_in_use_is_not_unloaded_and_an_unused_one_leaves_nothing(files: Files) -> None:
    path, adapters = files
    with LLM(path, adapters=adapters) as llm:
        stream = llm.stream(PROMPTS[1], SAMPLING | {"max_tokens": 400}, options={"adapter": "a"})
        next(stream)
        with pytest.raises(UsageError, match="'a' is in use by 1 requests"):
            llm.unload_adapter("a")
        llm.unload_adapter("c")
        stream.close()
        complete(llm, [1], ["a"] * 8)
        bank = llm._service.engine._runner.adapters._bank
        assert bank is not None
        pieces = [p for linear in bank._wrapped.values() for p in linear.pieces.values()]
        panels = [weakref.ref(piece) for piece in pieces]
        del bank, pieces
        llm.unload_adapter("a")
        llm.unload_adapter("b")
        gc.collect()
        assert panels
        assert all(panel() is None for panel in panels)
        assert llm._service.engine._runner._adapted_replayer is None
        assert complete(llm, [0, 3]) == complete(llm, [0, 3], [None] * 8)


def test_names_are_checked(files: Files, tmp_path: Path) -> None:
    path, adapters = files
    with LLM(path, adapters={"a": adapters["a"]}) as llm:
        with pytest.raises(RequestError, match=r"^adapter: 'A' is not loaded\. .* a") as caught:
            llm.generate("x", options={"adapter": "A"})
        assert caught.value.field == "adapter"
        with pytest.raises(UsageError, match="'a' is loaded already"):
            llm.load_adapter("a", adapters["b"])
        with pytest.raises(UsageError, match="expected a name"):
            llm.load_adapter("", adapters["b"])
        with pytest.raises(RequestError, match="'b' is not loaded"):
            llm.unload_adapter("b")
        llm.unload_adapter("a")
        with pytest.raises(RequestError, match="No adapter is loaded"):
            llm.generate("x", options={"adapter": "a"})
        llm.load_adapter("a", adapters["a"])
        llm.default_adapter = "a"
        assert complete(llm, [1], [None] * 8) == complete(llm, [1], ["a"] * 8)
    with pytest.raises(UsageError, match="closed"):
        llm.unload_adapter("a")


def test_what_replaces_whole_weights_can_only_be_merged(files: Files, tmp_path: Path) -> None:
    path, _ = files
    model = load(path).model
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
        "base_model.model.lm_head.weight": torch.ones(480, 32),
    }
    given = {"modules_to_save": ["lm_head"], "layers_to_transform": [0]}
    folder = write_made_adapter(tmp_path / "w", model, targets=["q_proj"], tensors=tensors, **given)
    with LLM(path) as llm, pytest.raises(UsageError, match="replaces lm_head as a whole"):
        llm.load_adapter("w", folder)
    with LLM(path, merge=folder, dtype="float32", compute="reference") as merged:
        assert torch.equal(merged.model.lm_head.weight, torch.ones(480, 32))  # type: ignore[union-attr,arg-type]


def test_an_adapter_of_another_model_stops_the_loading(files: Files, tmp_path: Path) -> None:
    path, _ = files
    other = load(write_tiny_checkpoint(tmp_path / "m", config={"hidden_size": 64})).model
    folder = write_made_adapter(tmp_path / "a", other, targets=["q_proj"])
    alive = threading.active_count()
    with pytest.raises(CheckpointError, match="q_proj: is adapted as"):
        LLM(path, adapters={"a": folder})
    assert threading.active_count() == alive


def test_asyncio(files: Files) -> None:
    path, adapters = files

    async def run() -> tuple[Any, Any]:
        async with AsyncLLM(path) as llm:
            await llm.load_adapter("a", adapters["a"])
            with_it, without = await asyncio.gather(
                llm.generate([PROMPTS[1]], SAMPLING, options={"adapter": "a"}),
                llm.generate([PROMPTS[1]], SAMPLING),
            )
            await llm.unload_adapter("a")
            assert llm.adapters == ()
            return told(with_it[0]), told(without[0])

    with LLM(path, adapters={"a": adapters["a"]}) as llm:
        assert asyncio.run(run()) == (
            complete(llm, [1], ["a"] * 8)[0],
            complete(llm, [1], [None] * 8)[0],
        )


def test_an_adapter_that_goes_before_its_request_comes_ends_that_request_only(
    files: Files,
) -> None:
    """Between a constraint's compilation and the engine's turn there is time for that."""
    path, adapters = files
    with LLM(path, adapters={"a": adapters["a"]}) as llm:
        worker = llm._service._worker
        sampling = {"constraint": {"regex": "a{1,9}"}, "max_tokens": 5}
        late = llm._request(PROMPTS[0], sampling, {"adapter": "a", "timeout_s": 0.0})
        matcher = worker.engine.prepare(late)
        llm.unload_adapter("a")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        worker.submit([late], [matcher], events.put)
        end = events.get(timeout=20)
        assert isinstance(end, FinishEvent)
        assert end.reason == "error"
        assert end.error is not None
        assert "adapter: 'a' is not loaded" in end.error
        assert llm.generate("abc", SAMPLING).finish_reason == "length"
        assert events.empty()


def test_plain_models_of_any_dtype_are_adapted(tmp_path: Path) -> None:
    served = engine()
    adapter = read_adapter(write_made_adapter(tmp_path, MODEL))
    served.load_adapter("a", served.prepare_adapter(adapter))
    assert served.adapters == ("a",)
    wrapped = served._runner.adapters.model
    assert wrapped is not MODEL
    served.unload_adapter("a")
    assert served.adapters == ()
