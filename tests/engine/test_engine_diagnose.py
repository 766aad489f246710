"""Numbers that are none in one request: it ends, naming where they arose, and others go on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import engine, finish, request, run, tokens

from fakes import tiny_model
from qwenkit import LLM
from qwenkit.engine.engine import Engine
from qwenkit.kernels.ops.silu_mul import silu_mul
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

BAD = ord("~")
VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
MARK = 12.0  # of the embedding of "~" alone, so that a module can tell it


def marked_model(**changes: Any) -> Any:
    """A tiny model in which only "~" has something in the last of its numbers."""
    model = tiny_model(**changes).double()
    model.dtype = torch.float64
    model.model.embed_tokens.weight[:, -1] = 0
    model.model.embed_tokens.weight[BAD, -1] = MARK
    for layer in model.model.layers:  # nothing else writes there
        layer.self_attn.o_proj.weight[-1] = 0
        layer.mlp.down_proj.weight[-1] = 0
    return model


@contextmanager
def spoiled(model: Any, path: str, value: float) -> Iterator[None]:
    """While it lasts, the module at `path` gives `value` for tokens whose input has the mark."""
    marks: list[torch.Tensor] = []
    first = model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs: marks.append(inputs[0][:, -1].abs() > MARK / 2)
    )

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[marks[-1], 3] = value
        return changed

    second = model.get_submodule(path).register_forward_hook(spoil)
    yield
    first.remove()
    second.remove()


def error(events: Any) -> str:
    assert finish(events).reason == "error"
    return str(finish(events).error)


PLACES = (
    "model.layers.0.self_attn",
    "model.layers.0.mlp",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1",
)


@VALUES
@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("prompt", ["~", "abc~", "a~ and some more", "x" * 30 + "~" + "y" * 30])
@pytest.mark.parametrize("max_batch_tokens", [8, 512])
def test_the_module_is_named_wherever_in_the_prompt_it_was(
    path: str, value: float, prompt: str, max_batch_tokens: int
) -> None:
    model = marked_model()
    asked = [request("bad", prompt, max_tokens=10)]
    asked += [request(f"good {i}", f"good {i} " * 4, max_tokens=10) for i in range(3)]
    sizes = {"max_batch_tokens": max_batch_tokens, "max_sequences": 8, "prefix_cache": False}
    expected = {one.id: run(engine(model, **sizes), one)[one.id] for one in asked[1:]}
    last = path in PLACES[2:] and not prompt.endswith("~")
    with spoiled(model, path, value):
        events = run(engine(model, **sizes), *asked)
    if last:  # behind the last attention nothing leads from one token to another
        assert finish(events["bad"]).reason in ("length", "stop")
    else:
        message = error(events["bad"])
        assert f"in the output of {path}, at token {prompt.index('~')} of the sequence" in message
        assert tokens(events["bad"]) == []
    assert {name: events[name] for name in expected} == expected


def test_an_overflow_of_float16_is_named() -> None:
    model = marked_model().half()
    model.dtype = torch.float16
    with spoiled(model, "model.layers.0.mlp.gate_proj", 70_000.0):
        events = run(
            engine(model, prefix_cache=False),
            request("bad", "ab~cd"),
            request("good", "other", max_tokens=3),
        )
    assert "the output of model.layers.0.mlp.gate_proj, at token 2 of" in error(events["bad"])
    assert finish(events["good"]).reason != "error"


def test_a_token_that_is_sampled_ends_the_output_in_its_own_step() -> None:
    model = marked_model()
    model.lm_head.weight[:] = 0
    model.lm_head.weight[BAD, :] = 9  # "~" or anything, by the sign of a sum
    served = engine(model, prefix_cache=False)
    with spoiled(model, "model.layers.1.mlp", math.nan):
        (events,) = run(served, request("a", "b", seed=1, temperature=1.0, max_tokens=60)).values()
    assert "in the output of model.layers.1.mlp, at token" in error(events)
    assert tokens(events)[-1] == BAD
    assert BAD not in tokens(events)[:-1]


def test_prompts_go_through_caches_of_whole_numbers_too() -> None:
    model = tiny_model()
    model.model.embed_tokens.weight[BAD, 2] = math.nan
    for kv_dtype in ("fp32", "bf16", "int8", "int4"):
        events = run(
            engine(
                model, prefix_cache=False, kv_dtype=kv_dtype, max_batch_tokens=4, max_sequences=2
            ),
            request("bad", "abcd~efghijkl", max_tokens=3),
            request("good", "other", max_tokens=3),
        )
        message = error(events["bad"])
        assert "the output of model.embed_tokens, at token 4 of" in message
        assert finish(events["good"]).reason != "error"


def test_a_model_that_cannot_be_watched_ends_the_request_all_the_same() -> None:
    from serving import Wrapped

    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits * math.nan

    (events,) = run(engine(Wrapped(spoil)), request("a", "abc")).values()
    assert "It arose somewhere in the model, at token 2 of the sequence" in error(events)


def test_a_fault_of_the_search_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.model.embed_tokens.weight[BAD, 2] = math.nan
    served: Engine = engine(model, prefix_cache=False)
    monkeypatch.setattr(served._runner, "locate", lambda *_: 1 // 0)
    (events,) = run(served, request("a", "~")).values()
    assert error(events).startswith("NonFiniteError: 272 of the model's 272 logits")


@pytest.mark.parametrize("weights", ["auto", "int4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_no_output_is_silent_whichever_weight_is_none(
    weights: str, kv_dtype: str, tmp_path: Path
) -> None:
    """Row 21, on the kernels of this machine: planted behind the check that loading makes."""
    config = {"hidden_size": 64, "intermediate_size": 64}
    folder = write_tiny_checkpoint(tmp_path, config=config, tensors=tiny_tensors(CONFIG | config))
    sampling = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    prompts = ["hello", "another"]
    with LLM(folder, weights=weights, kv_dtype=kv_dtype, threads=1) as llm:
        if not silu_mul.backends:
            pytest.skip("no native kernels here")
        before = [c.token_ids for c in llm.generate(prompts, sampling)]
        for name, numbers in plantable(llm.model):
            for value in (math.nan, math.inf, -math.inf):
                kept = numbers[5].clone()
                numbers[5] = value
                done = llm.generate(prompts, sampling)
                numbers[5] = kept
                assert [c.finish_reason for c in done] == ["error"] * 2, (name, value)
                assert [c.token_ids for c in done] == [()] * 2
                assert all("It arose in the output of " in str(c.error) for c in done)
        assert [c.token_ids for c in llm.generate(prompts, sampling)] == before


def plantable(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of numbers but the embedding's, flat, as what runs reads it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "embed_tokens" in name:
            continue
        if tensor.is_floating_point():
            yield name, tensor.detach().view(-1)
            continue
        kind: Any = model.get_submodule(name.rpartition(".")[0]).kind
        if kind in ("bf16", "fp32"):
            yield name, tensor.view(torch.bfloat16 if kind == "bf16" else torch.float32).view(-1)


def spoil_row(weight: Any, row: int) -> None:
    """Make one row of a weight infinite, where it is."""
    tensors = weight.to_tensors()
    tensors["scales" if "scales" in tensors else "weight"][row] = math.inf
    changed = type(weight).from_tensors(tensors, shape=weight.shape, storage=weight.storage)
    for mine, other in zip(weight.buffers(), changed.buffers(), strict=True):
        mine.copy_(other)


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_neighbours_keep_every_bit_on_native_kernels(weights: str, tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 64}
    folder = write_tiny_checkpoint(tmp_path, config=config, tensors=tiny_tensors(CONFIG | config))
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 2}
    good = [f"neighbour {i} " * (i + 1) for i in range(4)]
    with LLM(folder, weights=weights, threads=1) as llm:
        if not silu_mul.backends:
            pytest.skip("no native kernels here")
        expected = llm.generate(good, sampling)
        used = {i for c in expected for i in (*c.prompt_token_ids, *c.token_ids)}
        bad = next(i for i in range(256) if i not in used)
        spoil_row(llm.model.get_submodule("model.embed_tokens").weight, bad)
        done = llm.generate([good[0], [97, 32, bad], good[1], [bad] * 40, *good[2:]], sampling)
        for place, at in ((1, 2), (3, 0)):
            assert f"model.embed_tokens, at token {at} of" in str(done[place].error)
        others = [done[i] for i in (0, 2, 4, 5)]
        assert [c.token_ids for c in others] == [c.token_ids for c in expected]
        assert [c.logprobs for c in others] == [c.logprobs for c in expected]
