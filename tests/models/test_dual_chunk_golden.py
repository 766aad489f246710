"""Dual chunk attention against the numbers of the reference engine, packed and over the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenkit.checkpoint import open_checkpoint
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.runner import Runner
from qwenkit.fill import fill
from qwenkit.kernels.ops.dual_chunk_attention import dual_chunk_attention
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.position import DualChunk, Rotary, choose_extension
from qwenkit.models.spec import CausalModel, find
from qwenkit.types.extension import NO_EXTENSION, Extension

CHUNK, LOCAL, PERIOD = 48, 4, 44
BLOCK_TOKENS = 8


@pytest.fixture(scope="module")
def folder(golden_dir: Path) -> Path:
    return golden_dir / "dual_chunk"


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalModel:
    checkpoint = open_checkpoint(folder)
    architecture = find("qwen2")
    with torch.device("meta"):
        built = architecture.build(architecture.config(checkpoint.config))
    built.dtype = torch.float32
    fill(built, architecture, checkpoint)
    return built.eval()


def spec(trained: int | None, *, squared: bool) -> DualChunk:
    return DualChunk(
        rotary=Rotary(16, 10000.0),
        chunk_tokens=CHUNK,
        local_tokens=LOCAL,
        trained_tokens=trained,
        squared=squared,
    )


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("key", ["attn.n45.orig0", "attn.n88.orig64", "attn.n180.orig64"])
def test_attention_is_the_reference_engines(key: str, reference: dict[str, torch.Tensor]) -> None:
    q, k, v, expected = (reference[f"{key}.{name}"] for name in ("q", "k", "v", "vllm"))
    trained = int(key.partition("orig")[2]) or None
    position = spec(trained, squared=True)
    got = PackedCausal([len(q)]).attend(0, q, k, v, position)
    assert_near(got, expected)
    paper = PackedCausal([len(q)]).attend(0, q, k, v, spec(trained, squared=False))
    assert torch.equal(paper, got) == (trained is None)


def test_every_published_case(shared_dir: Path) -> None:
    folder = shared_dir / "golden" / "dual_chunk"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    tensors = load_file(folder / "reference.safetensors")
    checked = 0
    for case in cases:
        key = case["key"]
        if f"{key}.q" not in tensors:
            continue
        q, k, v = (tensors[f"{key}.{name}"] for name in ("q", "k", "v"))
        trained = case["original_max_position_embeddings"] or None
        position = spec(trained, squared=True)
        got = PackedCausal([len(q)]).attend(0, q, k, v, position)
        assert_near(got, tensors[f"{key}.vllm"])
        assert_near(got, tensors[f"{key}.naive"])
        length = case["n"]
        chosen = choose_extension(
            position,
            "per-request",
            trained_tokens=64,
            prompt_tokens=length,
            total_tokens=length,
        )
        assert chosen.factor == pytest.approx(case["scaling"], abs=1e-12)
        checked += 1
    assert checked == 16


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float) -> torch.Tensor:
    """By the paper's position matrix: every query and key rotated by their distance, in float64."""
    n, heads, head_dim = q.shape
    steps = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    place = torch.arange(n)
    chunk, inside = place // PERIOD, place % PERIOD
    apart = chunk[:, None] - chunk
    row = torch.where(apart == 1, (inside + PERIOD).clamp(max=CHUNK)[:, None], inside[:, None])
    row = torch.where(apart > 1, min(2 * PERIOD - 1, CHUNK), row)
    distance = (row - inside).double()  # [n, n]
    group = heads // k.shape[1]
    turned = torch.polar(torch.ones(()).double(), distance[..., None] * steps)  # [n, n, d / 2]
    result = []
    for head in range(heads):
        a = torch.complex(*q[:, head].double().chunk(2, 1))  # [n, d / 2]
        b = torch.complex(*k[:, head // group].double().chunk(2, 1))
        scores = (a[:, None] * b.conj()[None] * turned).real.sum(2) * factor / head_dim**0.5
        scores = scores.masked_fill(place > place[:, None], -torch.inf)
        result.append(scores.softmax(1) @ v[:, head // group].double())
    return torch.stack(result, 1).float()


def test_the_default_is_the_papers(reference: dict[str, torch.Tensor]) -> None:
    q, k, v = (reference[f"attn.n180.orig64.{name}"] for name in ("q", "k", "v"))
    got = PackedCausal([180]).attend(0, q, k, v, spec(64, squared=False))
    torch.testing.assert_close(got, written_out(q, k, v, 1.103407376753054), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [44, 89, 180])
def test_model_logits(length: int, reference: dict[str, torch.Tensor], model: CausalModel) -> None:
    ids = reference["input_ids"][0, :length]
    with torch.no_grad():
        got = model(ids, PackedCausal([length]))
    assert_near(got[-24:], reference[f"model.n{length}"][0])


def run(
    model: CausalModel, sequences: dict[str, tuple[list[int], Extension]], cuts: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The logits of each sequence's tokens, computed in pieces together with the others'."""
    runner = Runner(
        model,
        num_blocks=80,
        block_tokens=BLOCK_TOKENS,
        device=torch.device("cpu"),
        reference_ops=True,
    )
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in sequences}
    for start, stop in zip((0, *cuts), cuts, strict=False):
        chunks = []
        for number, (name, (ids, extension)) in enumerate(sequences.items()):
            part = tuple(ids[start:stop])
            if part:
                blocks = tuple(range(78 - number, 0, -len(sequences)))[: len(ids) // 8 + 1]
                chunks.append(Chunk(name, part, start, blocks, 1, extension))
        logits = runner.run(Plan(tuple(chunks)))
        for chunk, row in zip(chunks, logits, strict=True):
            rows[chunk.request_id].append(row)
    return {name: torch.stack(some) for name, some in rows.items()}


def test_incremental_decoding(reference: dict[str, torch.Tensor], model: CausalModel) -> None:
    ids = reference["input_ids"][0, :140].tolist()
    extension = Extension("dual-chunk")
    got = run(model, {"a": (ids, extension)}, (7, 40, *range(41, 141)))["a"]
    assert_near(got[-24:], reference["model.incr.p40.e140"][0])


def test_short_and_long_sequences_share_a_batch(model: CausalModel) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 320, (n,), generator=generator).tolist() for n in (130, 40, 100)]
    extensions = (Extension("dual-chunk"), NO_EXTENSION, Extension("dual-chunk"))
    sequences = dict(zip("abc", zip(rows, extensions, strict=True), strict=True))
    cuts = (20, 39, 40, 61, 99, 100, 130)
    together = run(model, sequences, cuts)
    for name, (ids, _) in sequences.items():
        with torch.no_grad():
            alone = model(torch.tensor(ids), PackedCausal([len(ids)]))
        ends = [min(cut, len(ids)) - 1 for cut in cuts[: len(together[name])]]
        torch.testing.assert_close(together[name], alone[ends], rtol=0, atol=2e-5)


def test_within_one_chunk_it_is_plain_attention_bit_for_bit(model: CausalModel) -> None:
    ids = list(range(5, 49))
    chosen = choose_extension(
        model.config.position,
        "per-request",
        trained_tokens=1024,
        prompt_tokens=40,
        total_tokens=44,
    )
    assert chosen == NO_EXTENSION
    got = run(model, {"a": (ids, chosen)}, (10, 44))["a"]
    position = model.config.position
    assert isinstance(position, DualChunk)
    layers = [m for m in model.modules() if hasattr(m, "position")]
    assert len(layers) == 3
    try:
        for layer in layers:
            vars(layer)["position"] = position.rotary
        plain = run(model, {"a": (ids, NO_EXTENSION)}, (10, 44))["a"]
    finally:
        for layer in layers:
            vars(layer)["position"] = position
    assert torch.equal(got, plain)


def test_the_op_is_differentiable_and_agrees_with_itself_in_pieces() -> None:
    for case in dual_chunk_attention.cases():
        whole = dual_chunk_attention(*case)
        assert whole.shape == case[0].shape
        assert whole.isfinite().all()
    q, k, v = torch.randn(3, 60, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    for tensor in (q, k, v):
        tensor.requires_grad_(True)
    output = PackedCausal([60]).attend(0, q, k, v, spec(None, squared=False))
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None
    assert k.grad is not None
    assert k.grad.abs().sum() > 0
