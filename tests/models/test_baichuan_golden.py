"""Baichuan2-13B against its own code: numbers that it gave on a random model, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import golden_model, paged_logits, read_tensors, worst
from torch import nn
from torch.nn import functional

from qwenkit.layers.attention import PackedCausal
from qwenkit.models.baichuan import NormalisedHead, alibi_slopes

Reference = dict[str, torch.Tensor]
NEAR = 1e-4  # of the largest logit
LENGTHS = (1, 7, 33, 96)


@pytest.fixture(scope="module")
def folder(golden_dir: Path) -> Path:
    return golden_dir / "baichuan2"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return read_tensors(folder / "reference.safetensors")


@pytest.mark.parametrize("heads", [4, 6, 40])
def test_slopes(reference: Reference, heads: int) -> None:
    assert torch.equal(torch.tensor(alibi_slopes(heads)), reference[f"alibi_slopes.{heads}"])


def test_whole_sequences(folder: Path, reference: Reference) -> None:
    model = golden_model(folder)
    sequences = [reference["input_ids"][:n] for n in LENGTHS]
    packed = model(torch.cat(sequences), PackedCausal(LENGTHS)).split(LENGTHS)
    paged = paged_logits(model, sequences, [[n] for n in LENGTHS])
    for n, one, other in zip(LENGTHS, packed, paged, strict=True):
        assert worst(one, reference, f"full.n{n}") < NEAR
        assert worst(other, reference, f"full.n{n}") < NEAR


@pytest.mark.parametrize("native", [False, True], ids=["reference", "kernels"])
def test_token_by_token(folder: Path, reference: Reference, native: bool) -> None:
    model = golden_model(folder)
    ids = reference["input_ids"][:40]
    (logits,) = paged_logits(model, [ids], [range(12, 41)], native=native)
    assert worst(logits, reference, "incr.p12.e40") < NEAR


def test_batch(folder: Path, reference: Reference) -> None:
    model = golden_model(folder)
    sequences = [reference[f"batch.{n}.ids"] for n in range(2)]
    for n, logits in enumerate(paged_logits(model, sequences, [[len(s)] for s in sequences])):
        assert worst(logits, reference, f"batch.{n}") < NEAR


def test_training(folder: Path, reference: Reference) -> None:
    model = golden_model(folder).requires_grad_(True)
    ids = reference["input_ids"][:40].long()
    logits = model(ids, PackedCausal([40], training=True))  # [40, vocab_size]
    loss = functional.cross_entropy(logits[:-1], ids[1:])
    torch.testing.assert_close(loss, reference["train.loss"][0], rtol=1e-6, atol=0)
    # Baichuan's z-loss is the square of the largest logit, not of the sum's logarithm.
    with_z_loss = loss + 2e-4 * logits[:-1].amax(-1).square().mean()
    torch.testing.assert_close(with_z_loss, reference["train.loss_zloss2e-4"][0], rtol=1e-6, atol=0)
    with_z_loss.backward()  # type: ignore[no-untyped-call]
    grad = model.get_parameter("lm_head.weight").grad
    assert grad is not None
    expected = reference["train.grad.lm_head"]
    torch.testing.assert_close(grad[::6], expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_head_is_normalised_by_the_weight_it_has_now() -> None:
    head = NormalisedHead(8, 5)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2):  # measured lengths belong to one weight
        weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        head.weight = nn.Parameter(weight, requires_grad=False)
        for _ in range(2):
            torch.testing.assert_close(head(x), functional.linear(x, functional.normalize(weight)))
    trained = nn.Parameter(torch.ones(5, 8))
    head.weight = trained
    before = head(x)
    with torch.no_grad():
        trained.mul_(3)
        trained[:, 0] = 0
    assert not torch.allclose(head(x), before)
    with torch.no_grad():
        trained.zero_()
    assert torch.equal(head(x), torch.zeros(3, 5))
